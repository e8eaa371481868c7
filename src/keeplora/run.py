"""The continual loop: a model learns a stream of tasks by a method, and every task is evaluated after each.

A run that was cut off goes on after its last finished task.
"""

import dataclasses
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from keeplora.collect import Track, silent
from keeplora.config import Config, parse
from keeplora.evaluate import evaluate
from keeplora.ledger import Ledger, open_ledger
from keeplora.measure import Phases, measured
from keeplora.methods import Method, MethodConfig, find_method
from keeplora.models import StreamTask, family_of, locate
from keeplora.report import page
from keeplora.results import Results
from keeplora.task import TaskSpec, read_benchmark
from keeplora.train import TrainConfig, best_device, fit, seed_everything

MOST_ORDERS = 99_999
"""The highest number of an order; each needs all before it, to be another one."""

Watch = Callable[[Results], None]
"""Called with the results so far: at the start, and after each task."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """One run: a model, a stream of tasks, a method."""

    benchmark: str = "mini"
    """Name of a benchmark, or path of its TOML file."""
    model: str = "mini"
    """The embedded model, a hub name, or a folder."""
    method: str = "keeplora"
    """Name of the method, or of a variant of one."""
    seed: int = 0
    """Seed of every random draw."""
    output: Path = Path("runs/run")
    """The run directory; a run that was cut off goes on where it stopped."""
    evaluation: Literal["test", "validation"] = "test"
    """The split to evaluate on; choose settings on validation."""
    order: int = 0
    """Order of the tasks: 0 for the benchmark's own, k for the k-th random one, each another than those before."""
    first_tasks: int | None = None
    """Learn only this many tasks, the first ones of the stream."""
    save_model: bool = True
    """Write the merged model after each task; without it, it can be made again from the adapters."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How each task is optimised."""
    options: MethodConfig = field(default_factory=MethodConfig)
    """The method's own options; left out, its defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method, options = find_method(self.method)
        kind = method.Config
        if type(self.options) is MethodConfig and (options or kind is not MethodConfig):
            object.__setattr__(self, "options", parse(kind, options, source=f"method {self.method}"))
        if type(self.options) is not kind:
            raise ValueError(
                f"options of method {self.method!r} must be {kind.__name__}, not {type(self.options).__name__}"
            )
        for name, most in (("seed", 2**31 - 1), ("order", MOST_ORDERS)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} = {getattr(self, name)} must be from 0 to {most}")
        if self.first_tasks is not None and self.first_tasks < 1:
            raise ValueError(f"first_tasks = {self.first_tasks} must be at least 1")


def run(config: RunConfig, *, track: Track = silent, watch: Watch = lambda results: None) -> Results:
    """Learn a stream of tasks and return the scores; everything is written to `config.output` as it goes.

    Raises:
        ValueError: If something of the configuration or the data is wrong, or training diverges; the tasks that were
            finished before stay in the run directory.
    """
    best_device()  # Processes must have met before the run directory is opened: only the first one writes to it.
    specs = stream_of(config)
    with open_ledger(config.output, _plain(config, specs), [spec.name for spec in specs]) as ledger:
        if not ledger.is_complete:
            learn(config, ledger, track, watch)
        results = ledger.results()
        ledger.write("report.html", page([results]).encode())
        ledger.write_manifest()
        return results


def load_stream(
    model: str = "mini",
    benchmark: str = "mini",
    *,
    batch_size: int = 64,
    evaluation: Literal["test", "validation"] = "test",
    seed: int = 0,
    track: Track = silent,
) -> tuple[nn.Module, list[StreamTask]]:
    """Load a model, in float32 on the best device, and the tasks of a benchmark for it.

    Args:
        model: The embedded model, a hub name, or a folder.
        benchmark: Name of a benchmark, or path of its TOML file.
        batch_size: Images in a batch.
        evaluation: The split to evaluate on, test or validation.
        seed: Seed of the order of the training batches.
        track: Shows progress over the images that are read.

    Raises:
        ValueError: If the model, the benchmark or the data is wrong; the message names what.
    """
    train = TrainConfig(batch_size=batch_size)
    config = RunConfig(benchmark=benchmark, model=model, seed=seed, evaluation=evaluation, train=train)
    return open_stream(config, track)


def open_stream(config: RunConfig, track: Track = silent) -> tuple[nn.Module, list[StreamTask]]:
    """Load the model of a run, in float32 on the best device, and its tasks in their order."""
    family, source = family_of(config.model), locate(config.model)
    tasks = family.tasks(
        source,
        stream_of(config),
        batch_size=config.train.batch_size,
        evaluation=config.evaluation,
        seed=config.seed,
        track=track,
    )
    return family.load(source).to(best_device()), tasks


def stream_of(config: RunConfig) -> tuple[TaskSpec, ...]:
    """Return the tasks that a run learns, in their order.

    Raises:
        ValueError: If the benchmark is wrong, or its tasks have fewer orders than the number of this one.
    """
    specs = read_benchmark(config.benchmark).tasks
    if config.order >= (num_orders := math.factorial(len(specs))):
        raise ValueError(f"order = {config.order}: {len(specs)} tasks have only the orders 0 to {num_orders - 1}")
    return tuple(specs[place] for place in _permutation(config.order, len(specs))[: config.first_tasks])


@cache
def _permutation(number: int, size: int) -> tuple[int, ...]:
    """Return 0 to size - 1 in the number-th distinct order; number 0 is the identity, the others are random."""
    found = {(identity := tuple(range(size))): None}
    seed = 0
    while len(found) <= number:
        seed += 1
        places = list(identity)
        random.Random(seed).shuffle(places)
        found[tuple(places)] = None
    return list(found)[number]


def learn(config: RunConfig, ledger: Ledger, track: Track, watch: Watch) -> None:
    """Learn, one after another, the tasks that the ledger does not have yet."""
    model, tasks = open_stream(config, track)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    lessons = method.plan(tasks)
    if "zero_shot" not in ledger.manifest:
        phases: Phases = {}
        with measured(phases, "zero_shot"):
            scores = evaluate(model, tasks, track=track)
        ledger.start(scores, phases)
    scores = ledger.manifest["zero_shot"]
    watch(ledger.results())
    for index, (task, lesson) in enumerate(zip(tasks, lessons, strict=True)):
        if index < ledger.num_finished:
            model, scores = replay(method, model, task, ledger, index), ledger.tasks[index]["scores"]
            continue
        seed_everything(config.seed + 1000 * index)
        phases = {}
        with measured(phases, "before_task"):
            adapted = method.before_task(model, lesson)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        with measured(phases, "train"):
            losses = fit(adapted, lesson, config.train, epochs=task.epochs, penalty=method.penalty, track=track)
        with measured(phases, "after_task"):
            model = method.after_task(adapted, lesson)
        with measured(phases, "evaluate"):
            scores = evaluate(model, tasks, track=track) if method.record.adapter else scores
        parameters = {"trained": trained, "added": method.record.added_parameters}
        details = {"name": task.name, "scores": scores, "losses": losses, "phases": phases, "parameters": parameters}
        changed = (method.record.adapter is not None and method.record.merged) or index == 0
        saves = changed and config.save_model
        save = partial(family_of(config.model).save, model, locate(config.model)) if saves else None
        ledger.add_task(method.record, details, save)
        watch(ledger.results())


def replay(method: Method, model: nn.Module, task: StreamTask, ledger: Ledger, index: int) -> nn.Module:
    """Redo a finished task from the ledger's files instead of learning it again."""
    record, folder = ledger.record(index)
    if record.head:
        task.load_head(record.head)
    return method.replay(model, record, folder)


def _plain(config: RunConfig, specs: tuple[TaskSpec, ...]) -> dict[str, Any]:
    """Return as JSON values what a run is: its configuration and its tasks, but not the place it is written to."""
    values = dataclasses.asdict(config)
    del values["output"]
    if config.benchmark.endswith(".toml"):
        values["benchmark"] = str(Path(config.benchmark).resolve())
    tasks = {spec.name: dataclasses.asdict(spec) for spec in specs}
    for spec in tasks.values():
        spec["path"] = spec["path"].name
    return dict(json.loads(json.dumps({**values, "tasks": tasks})))
