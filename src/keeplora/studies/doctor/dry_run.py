"""A run in small: every verb of the method on a few real batches of each task, timed; what fails here fails there.

The learning rate is so small that no weight changes in float32, so that one model serves for all tasks. Nothing is
written.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import gradients as collect
from keeplora.methods.base import Method
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track
from keeplora.runs.config import RunConfig
from keeplora.studies.doctor.findings import Finding, listed, without_task
from keeplora.studies.doctor.resource_estimate import Pace, Paces, pace_of
from keeplora.task import Batch, Task
from keeplora.training.profiling import Costs, measured
from keeplora.training.trainer import fit

T = TypeVar("T")

BATCHES = 4
"""How many batches of each phase are tried; the first one warms up."""

HARMLESS_RATE = 1e-9
"""A learning rate whose steps vanish when they are added to a weight in float32."""

REHEARSAL_SECONDS = 20.0
"""After two tasks, those with the fewest and the most classes, no further one is tried once this long was spent."""

FAILURES = (ValueError, RuntimeError, LookupError, OSError)
"""What a model, a method or the data raise when they do not fit together; no room in memory is a RuntimeError."""


@dataclass
class Rehearsal:
    """What was learned by trying."""

    paces: dict[str, Paces] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    """How many training batches an epoch of each task has."""
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    extra_bytes: int = 0
    """The most that a task left beside its adapter and directions."""
    changes_model: bool = False
    """Whether the method learned anything: otherwise the model is evaluated once."""
    findings: list[Finding] = field(default_factory=list)


class FirstBatches:
    """The first batches of an iterable, and the seconds from the request of each to the request of the next."""

    def __init__(self, source: Callable[[], Iterable[Batch]], limit: int) -> None:
        self.source = source
        self.limit = limit
        self.passes: list[list[float]] = []

    def __len__(self) -> int:
        return min(self.limit, len(cast(Sized, self.source())))

    def __iter__(self) -> Iterator[Batch]:
        seconds: list[float] = []
        self.passes.append(seconds)
        start = time.perf_counter()
        for batch in itertools.islice(self.source(), self.limit):
            yield batch
            _wait_for_device()
            now = time.perf_counter()
            seconds.append(now - start)
            start = now


@contextmanager
def clocked(task: Task, verb: str, limit: int) -> Iterator[FirstBatches]:
    """Let one of a task's sources of batches (`batches`, `test_batches`) give only the first few; give it back."""
    clock = FirstBatches(getattr(task, verb), limit)
    vars(task)[verb] = lambda: clock
    try:
        yield clock
    finally:
        del vars(task)[verb]


def unreached_layers(model: nn.Module, task: Task, targets: list[str]) -> list[str]:
    """Return the target layers that no gradient of a task's first batch reaches.

    Raises:
        LearningError: If the loss or a gradient is not finite.
    """
    with clocked(task, "batches", 1):
        gradients = collect.mean_gradients(model, task, targets)
    return [name for name, gradient in gradients.items() if not gradient.any()]


def rehearse(
    model: nn.Module, tasks: list[StreamTask], targets: list[str], config: RunConfig, track: Track
) -> Rehearsal:
    """Go through a few batches of all that a run does with each task, and stop where something fails.

    Args:
        model: The model; its weights stay as they are.
        tasks: The tasks, from the fewest classes to the most.
        targets: The layers to adapt.
        config: The run.
        track: Shows progress over the tasks.
    """
    found = Rehearsal()
    task = tasks[0]
    start = time.perf_counter()
    try:
        if unreached := unreached_layers(model, task, targets):
            found.findings.append(_unreached_finding(unreached, targets, task.name))
        method = _method_of(config)
        scheduled = list(zip(tasks, method.schedule(tasks), strict=True))
        order = spread(scheduled) if method.one_by_one else scheduled
        for task, training_task in track(order, "rehearsing", len(order)):
            with _heard(found, task.name):
                model = _learn(model, task, training_task, (method, config, found))
            is_late = time.perf_counter() - start > REHEARSAL_SECONDS
            if method.one_by_one and is_late and len(found.paces) > 1:
                break
    except FAILURES as error:
        message = f"a run would fail: {without_task(error, task.name)}"
        cure = "lower batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        found.findings.append(Finding("problem", task.name, message, cure))
    return found


def spread(items: Sequence[T]) -> list[T]:
    """Return sorted items in an order whose first ones cover the range: the ends, the middle, the quarters, ..."""
    left = list(range(len(items)))
    order = [left.pop(0), left.pop()] if len(left) > 1 else left[:]
    left = [place for place in left if place not in order]
    while left:
        order.append(max(left, key=lambda place: min(abs(place - other) for other in order)))
        left.remove(order[-1])
    return [items[place] for place in order]


@contextmanager
def _heard(found: Rehearsal, task: str) -> Iterator[None]:
    """Turn what the library logs inside into notes: a run would say it too."""
    logger, heard = logging.getLogger("keeplora"), _Notes()
    before = logger.propagate
    logger.addHandler(heard)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(heard)
        found.findings += [Finding("note", task, message.removeprefix(f"task {task!r}: ")) for message in heard.texts]


class _Notes(logging.Handler):
    """Keeps the messages it is given."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _method_of(config: RunConfig) -> Method:
    options: Any = config.options
    if hasattr(options, "gradient_share"):  # A few batches are no share to speak of.
        options = dataclasses.replace(options, gradient_share=1.0)
    return find_method(config.method)[0](options, seed=config.seed)


def _learn(
    model: nn.Module, task: StreamTask, training_task: Task, rest: tuple[Method, RunConfig, Rehearsal]
) -> nn.Module:
    """Learn one task with a few batches and return the merged model."""
    method, config, found = rest
    train = dataclasses.replace(config.train, epochs=1, learning_rate=HARMLESS_RATE)
    found.batches[task.name] = len(cast(Sized, training_task.batches()))
    with clocked(training_task, "batches", BATCHES) as clock:
        with _phase(found, "gradient", clock) as gradient:
            adapted = method.before_task(model, training_task)
        with _phase(found, "train", clock) as training:
            fit(adapted, method.training_task(adapted, training_task, epochs=1), train, penalty=method.penalty)
        with _phase(found, "merge", clock) as merging:
            model = method.after_task(adapted, training_task)
    with clocked(task, "test_batches", BATCHES) as clock, _phase(found, "evaluate", clock) as evaluating:
        evaluate(model, [task])
    paces = [pace for phase in (gradient, training, merging, evaluating) for pace in phase]
    found.paces[task.name] = Paces(*paces)
    record = method.record
    found.changes_model |= record.adapter is not None
    beside = [*record.head.values(), *record.state.values()]
    found.extra_bytes = max(found.extra_bytes, sum(_bytes_of(tensor) for tensor in beside))
    return model


@contextmanager
def _phase(found: Rehearsal, name: str, clock: FirstBatches) -> Iterator[list[Pace]]:
    """Append the pace of what runs inside to the list that is given, and keep its peak memory."""
    phases: Costs = {}
    paces: list[Pace] = []
    clock.passes = []
    with measured(phases, name):
        yield paces
        _wait_for_device()
    paces.append(pace_of(phases[name]["seconds"], clock.passes))
    found.peak_memory_mb[name] = max(found.peak_memory_mb.get(name, 0.0), phases[name]["peak_memory_mb"])


def _unreached_finding(unreached: list[str], targets: list[str], task: str) -> Finding:
    message = f"no gradient reaches {len(unreached)} of {len(targets)} layers on a batch: {listed(unreached)}"
    if len(unreached) == len(targets):
        return Finding("problem", task, message, "choose other targets")
    return Finding("warning", task, message, "leave them out of targets: they would learn nothing")


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
