"""What a run is: its configuration, and from it the stream of tasks and the model."""

import dataclasses
import json
import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from keeplora.config import Config, parse
from keeplora.methods.base import MethodConfig
from keeplora.methods.registry import find_method, known_methods, method_behind
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import EMBEDDED, family_of, locate
from keeplora.progress import Track, silent
from keeplora.task import TaskSpec, read_benchmark
from keeplora.training.trainer import TrainConfig, best_device

MOST_ORDERS = 99_999
"""The highest number of an order; each needs all before it, to be another one."""

NOT_PART_OF_A_RUN = ("output", "checkpoint_steps", "checkpoint_minutes")
"""Settings that do not change what a run learns: it may go on with others."""


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
    """Learn only this many tasks of the benchmark, the first ones of the stream."""
    more: tuple[str, ...] = ()
    """Benchmarks whose tasks follow, each in its own order; a task of the same name and data comes once."""
    without: tuple[str, ...] = ()
    """Names of tasks to leave out."""
    save_model: bool = True
    """Write the merged model after each task; without it, it can be made again from the adapters."""
    checkpoint_steps: int | None = None
    """Optimiser steps from one checkpoint of training to the next; one at the end of each epoch if not given."""
    checkpoint_minutes: float = 5.0
    """The most minutes from one checkpoint of training to the next."""
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
        for name in ("first_tasks", "checkpoint_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if not self.checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes = {self.checkpoint_minutes} must be above 0")


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
        ValueError: If a benchmark is wrong, its tasks have fewer orders than the number of this one, two different
            tasks have one name, or a task to leave out is not there.
    """
    stream = {spec.name: spec for spec in _first_tasks(config)}
    for benchmark in config.more:
        for spec in read_benchmark(benchmark).tasks:
            if resolved(stream.setdefault(spec.name, spec)) != resolved(spec):
                raise ValueError(
                    f"benchmark {benchmark!r} has another task {spec.name!r} than the stream before it; rename one"
                )
    if unknown := [name for name in config.without if name not in stream]:
        raise ValueError(f"without = {unknown[0]!r} is no task of the stream; its tasks are {', '.join(stream)}")
    if not (left := tuple(spec for name, spec in stream.items() if name not in config.without)):
        raise ValueError(f"without = {list(config.without)} leaves no task to learn")
    return left


def _first_tasks(config: RunConfig) -> list[TaskSpec]:
    """Return the tasks of the benchmark itself."""
    specs = read_benchmark(config.benchmark).tasks
    if config.order >= (num_orders := math.factorial(len(specs))):
        raise ValueError(f"order = {config.order}: {len(specs)} tasks have only the orders 0 to {num_orders - 1}")
    return [specs[place] for place in _permutation(config.order, len(specs))][: config.first_tasks]


def resolved(spec: TaskSpec) -> TaskSpec:
    """Return a task in the form in which it can be compared with one of another file."""
    return dataclasses.replace(spec, path=spec.path.resolve(), hub="")


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


def plain_values(config: RunConfig) -> dict[str, Any]:
    """Return as JSON values what a run is, its tasks included; where and how often it is written is no part of it."""
    values = dataclasses.asdict(config)
    for key in NOT_PART_OF_A_RUN:
        del values[key]
    values |= {"benchmark": absolute(config.benchmark), "more": [absolute(name) for name in config.more]}
    if Path(config.model).is_dir() and config.model not in EMBEDDED:
        values["model"] = str(Path(config.model).resolve())
    # As a number: a task that is added to the file later is another stream, which is to be asked for.
    values["first_tasks"] = len(_first_tasks(config))
    tasks = {spec.name: dataclasses.asdict(spec) for spec in stream_of(config)}
    for spec in tasks.values():
        spec["path"] = spec["path"].name
    return dict(json.loads(json.dumps({**values, "tasks": tasks})))


def absolute(benchmark: str) -> str:
    """Return a benchmark's name, or its path so that it can be found from anywhere."""
    return str(Path(benchmark).resolve()) if benchmark.endswith(".toml") else benchmark


def run_defaults(benchmark: str, method: str, values: dict[str, Any], source: str) -> RunConfig:
    """Return a run's settings: the given values before the benchmark's own defaults before the library's.

    Raises:
        ValueError: If the benchmark or the method is unknown, or a value is wrong.
    """
    kind, variant = find_method(method)
    defaults = read_benchmark(benchmark).defaults
    if unknown := sorted(set(defaults) - {"train", *known_methods()}):
        raise ValueError(f"benchmark {benchmark!r}: [defaults.{unknown[0]}] is neither train nor a method")
    train: dict[str, Any] = dict(defaults.get("train", {}))
    options: dict[str, Any] = {}
    for table in (defaults.get(method_behind(method), {}), variant, defaults.get(method, {})):
        options |= {key: value for key, value in table.items() if key != "train"}
        if not isinstance(more := table.get("train", {}), dict):
            raise ValueError(f"benchmark {benchmark!r}: train = {more!r} in the defaults of a method must be a table")
        train |= more
    train |= _table(values, "train", source)
    options |= _table(values, "options", source)
    parsed = parse(RunConfig, {**values, "train": train, "benchmark": benchmark, "method": method}, source=source)
    return dataclasses.replace(parsed, options=parse(kind.Config, options, source=f"{source} [options]"))


def _table(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """Take a table out of a file's values."""
    table = values.pop(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{source}: {key} = {table!r} must be a table, [{key}]")
    return table
