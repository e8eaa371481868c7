"""A run in small: every verb of the method on a few real batches of each task, timed; what fails here fails there.

Steps are so small that no float32 weight changes: one model serves all tasks.
"""

import dataclasses
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging.handlers import BufferingHandler
from typing import Any, TypeVar, cast

import torch
from torch import nn

from keeplora.errors import listed
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import gradients as collect
from keeplora.methods.base import Method
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track
from keeplora.runs.config import RunConfig
from keeplora.studies.doctor.findings import FAILURES, Finding, Level
from keeplora.studies.doctor.resource_estimate import Pace, Paces, pace_of
from keeplora.task import Batch, Task
from keeplora.training.profiling import Costs, measured
from keeplora.training.trainer import TrainConfig, fit

T = TypeVar("T")

BATCHES = 4  # How many batches of each phase are tried; the first one warms up.
HARMLESS_RATE = 1e-9  # A learning rate whose steps vanish when they are added to a weight in float32.

DRY_RUN_SECONDS = 20.0
"""After two tasks, those with the fewest and the most classes, no further one is tried once this long was spent."""

EVALUATION_SECONDS = 3 * DRY_RUN_SECONDS  # Nor is the untouched model evaluated on a further one after so long.


@dataclass
class FirstBatches:
    """The first batches of an iterable, and the seconds from the request of each to the request of the next.

    With `spread`, as many from all over it: held-out images lie class by class.
    """

    source: Callable[[], Iterable[Batch]]
    limit: int
    spread: bool = False
    passes: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return min(self.limit, len(cast(Sized, self.source())))

    def __iter__(self) -> Iterator[Batch]:
        seconds: list[float] = []
        self.passes.append(seconds)
        total, last = len(cast(Sized, self.source())), len(self) - 1
        wanted = {round(i * (total - 1) / max(1, last)) if self.spread else i for i in range(len(self))}
        start = time.perf_counter()
        for place, batch in enumerate(itertools.islice(self.source(), max(wanted, default=-1) + 1)):
            if place in wanted:
                yield batch
                _wait_for_device()
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()


@contextmanager
def clocked(task: Task, verb: str, limit: int, *, spread: bool = False) -> Iterator[FirstBatches]:
    """Let one of a task's sources of batches (`batches`, `test_batches`) give only the first few; give it back."""
    clock = FirstBatches(getattr(task, verb), limit, spread)
    vars(task)[verb] = lambda: clock
    try:
        yield clock
    finally:
        del vars(task)[verb]


def unreached_layers(model: nn.Module, task: Task, targets: list[str]) -> list[str]:
    """Return the target layers that no gradient of a task's first batch reaches."""
    with clocked(task, "batches", 1):
        gradients = collect.mean_gradients(model, task, targets)
    return [name for name, gradient in gradients.items() if not gradient.any()]


@dataclass
class DryRun:
    """What was learned by trying a few batches of all that a run does with each task."""

    paces: dict[str, Paces] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)  # How many training batches an epoch of each task has.
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    extra_bytes: int = 0  # The most that a task left beside its adapter and directions.
    changes_model: bool = False  # Whether the method learned anything.
    findings: list[Finding] = field(default_factory=list)
    untouched: dict[str, tuple[float, str]] = field(default_factory=dict)
    """The untouched model's score on some batches of each task, and how many of how many these are."""

    def run(
        self, model: nn.Module, tasks: list[StreamTask], targets: list[str], config: RunConfig, track: Track
    ) -> None:
        """Try the tasks, which are sorted by their number of classes; stop where something fails."""
        task, start = tasks[0], time.perf_counter()
        try:
            if unreached := unreached_layers(model, task, targets):
                are_all = len(unreached) == len(targets)
                level: Level = "problem" if are_all else "warning"
                message = f"no gradient reaches {len(unreached)} of {len(targets)} layers on a batch: "
                cure = "choose other targets" if are_all else "leave them out of targets: they would learn nothing"
                self.findings.append(Finding(level, task.name, message + listed(unreached), cure))
            # Steps that change nothing are all lost to rounding.
            options: Any = dataclasses.replace(config.options, allow_merge_loss=True)
            if hasattr(options, "gradient_share"):  # A few batches are no share to speak of.
                options = dataclasses.replace(options, gradient_share=1.0)
            method = find_method(config.method)[0](options, seed=config.seed)
            scheduled = list(zip(tasks, method.schedule(tasks), strict=True))
            order = spread(scheduled) if method.one_by_one else scheduled
            is_over = False
            for task, training_task in track(order, "dry run", len(order)):
                is_over |= method.one_by_one and len(self.paces) > 1 and time.perf_counter() - start > DRY_RUN_SECONDS
                if is_over and time.perf_counter() - start > EVALUATION_SECONDS:
                    break
                pace = self._evaluate(model, task)
                if is_over:
                    continue
                with _warnings_as_notes(self.findings, task.name):
                    model = self._learn(model, task, training_task, method, config.train, pace)
        except FAILURES as error:
            cure = "lower batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
            self.findings.append(Finding("problem", task.name, f"a run would fail: {error}", cure))

    def _learn(
        self,
        model: nn.Module,
        task: StreamTask,
        training_task: Task,
        method: Method,
        train: TrainConfig,
        evaluate: Pace,
    ) -> nn.Module:
        """Learn one task with a few batches and return the merged model."""
        paces: dict[str, Pace] = {"evaluate": evaluate}
        train = dataclasses.replace(train, epochs=1, learning_rate=HARMLESS_RATE)
        self.batches[task.name] = len(cast(Sized, training_task.batches()))
        with clocked(training_task, "batches", BATCHES) as clock:
            with self._phase("gradient", clock, paces):
                adapted = method.before_task(model, training_task)
            with self._phase("train", clock, paces):
                fit(adapted, method.training_task(adapted, training_task, epochs=1), train, penalty=method.penalty)
            with self._phase("merge", clock, paces):
                model = method.after_task(adapted, training_task)
        self.paces[task.name] = Paces(**paces)
        self.changes_model |= method.record.adapter is not None
        beside = [*method.record.head.values(), *method.record.state.values()]
        self.extra_bytes = max(self.extra_bytes, sum(tensor.nbytes for tensor in beside))
        return model

    def _evaluate(self, model: nn.Module, task: StreamTask) -> Pace:
        """Score the untouched model on some batches of a task, and return the pace of it."""
        paces: dict[str, Pace] = {}
        total = len(cast(Sized, task.test_batches()))
        with clocked(task, "test_batches", BATCHES, spread=True) as clock, self._phase("evaluate", clock, paces):
            (score,) = evaluate(model, [task])
        self.untouched[task.name] = score, f"{min(BATCHES, total)} of {total}"
        return paces["evaluate"]

    @contextmanager
    def _phase(self, name: str, clock: FirstBatches, paces: dict[str, Pace]) -> Iterator[None]:
        """Write the pace of what runs inside to the paces, and keep its peak memory."""
        costs: Costs = {}
        clock.passes = []
        with measured(costs, name):
            yield
            _wait_for_device()
        paces[name] = pace_of(costs[name]["seconds"], clock.passes)
        self.peak_memory_mb[name] = max(self.peak_memory_mb.get(name, 0.0), costs[name]["peak_memory_mb"])


def spread(items: Sequence[T]) -> list[T]:
    """Return sorted items in an order whose first ones cover the range: the ends, the middle, the quarters, ..."""
    order: list[int] = []
    left = list(range(len(items)))
    while left:
        order.append(max(left, key=lambda place: min((abs(place - other) for other in order), default=0)))
        left.remove(order[-1])
    return [items[place] for place in order]


@contextmanager
def _warnings_as_notes(findings: list[Finding], task: str) -> Iterator[None]:
    """Turn what the library logs inside into notes: a run would say it too."""
    logger, heard = logging.getLogger("keeplora"), BufferingHandler(sys.maxsize)
    level = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before
        logger.setLevel(level)
        logger.removeHandler(heard)
        findings += [Finding("note", task, record.getMessage()) for record in heard.buffer]


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
