"""What a run is: its settings, resolved once, each with the place it came from."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from keeplora.config import FILLED_IN, Config, parse
from keeplora.data.benchmark import TaskSpec, absolute, read_benchmark, stream_of
from keeplora.methods.base import MethodConfig
from keeplora.methods.registry import METHODS, find_method, known_methods, method_behind
from keeplora.models.pretrained import WHOLE, Dtype, Precision, Quantization
from keeplora.models.registry import EMBEDDED
from keeplora.training.trainer import TrainConfig

Sourced = tuple[str, Mapping[str, Any]]
"""Where settings come from, and the settings: those of a run, and the tables `train` and `options`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """One run: a model, a stream of tasks, a method."""

    benchmark: str = "mini"
    """Name of a benchmark, or path of its TOML file."""
    model: str = "mini"
    """The embedded model, a hub name, or a folder."""
    method: str = "keeplora"
    """Name of the method, or of a variant of one."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random draw."""
    output: Path = Path("runs/run")
    """The run directory; a run that is there is resumed after its last completed phase."""
    data: Path | None = None
    """Folder of the benchmark's data, if they are not where its file says."""
    evaluation: Literal["test", "validation"] = "test"
    """The split to evaluate on; choose settings on validation."""
    order: Annotated[int, Field(ge=0, lt=100_000)] = 0  # Each needs all before it, to be another one.
    """Order of the tasks: 0 for the benchmark's own, k for the k-th random one, each another than those before."""
    first_tasks: PositiveInt | None = None
    """Learn only this many tasks of the benchmark, the first ones of the stream."""
    more: tuple[str, ...] = ()
    """Benchmarks whose tasks follow, each in its own order; a task of the same name and data comes once."""
    without: tuple[str, ...] = ()
    """Names of tasks to leave out."""
    dtype: Dtype = "float32"
    """Precision of the base model's weights; beside half precision, updates stay in float32."""
    quantize: Quantization = "none"
    """Load the base model's linear layers in 4 bits (NF4, by bitsandbytes); updates stay beside them in float32."""
    save_model: bool = True
    """Write the merged model after each task; without it, it can be made again from the adapters."""
    checkpoint_steps: PositiveInt | None = None
    """Optimiser steps from one checkpoint of training to the next; one at the end of each epoch if not given."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 5.0
    """The most minutes from one checkpoint of training to the next."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How each task is optimised."""
    options: MethodConfig = None  # type: ignore[assignment]
    """The method's own options; left out, its defaults."""
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False, metadata=FILLED_IN)
    """Where settings came from, by dotted name; filled in."""

    def __post_init__(self) -> None:
        kind, variant = find_method(self.method)
        if self.options is None:
            made = parse(kind.Config, variant, source=f"method {self.method}")  # type: ignore[unreachable]
            object.__setattr__(self, "options", made)
        super().__post_init__()
        if type(self.options) is not kind.Config:
            raise ValueError(
                f"options of method {self.method!r} must be {kind.Config.__name__}, not {type(self.options).__name__}"
            )
        if self.quantize != "none" and self.options.updates == "merged":
            raise ValueError(
                f"quantize = {self.quantize!r}: weights of 4 bits take no update; leave out updates = 'merged'"
            )
        _require_variant(self.method, variant, dataclasses.asdict(self.options))

    @property
    def precision(self) -> Precision:
        """What the base model is loaded in."""
        return Precision(self.dtype, self.quantize)

    @property
    def keeps_beside(self) -> bool:
        """Whether updates stay beside the weights, so that no merged model is written."""
        return self.options.updates == "beside" or (self.options.updates == "auto" and self.precision != WHOLE)

    @property
    def stream(self) -> tuple[TaskSpec, ...]:
        """The tasks that the run learns, in their order."""
        return stream_of(
            self.benchmark, data=self.data, order=self.order, first_tasks=self.first_tasks, more=self.more,
            without=self.without,
        )  # fmt: skip

    @property
    def probes(self) -> tuple[TaskSpec, ...]:
        """The tasks that are evaluated, and never learned."""
        return read_benchmark(self.benchmark, self.data).probes

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """Every setting by its dotted name, and where it came from."""
        defaults = _by_name(RunConfig(method=self.method))
        return {
            name: (value, self.sources.get(name, "default" if value == defaults[name] else "given"))
            for name, value in _by_name(self).items()
        }


def resolve(*given: Sourced) -> RunConfig:
    """Return a run's settings: those given, then the benchmark's, then the method's, then the library's.

    Of those given, the first ones go before the others. ValueError names what is wrong, and where it came from.
    """
    names = {"benchmark": RunConfig.benchmark, "method": RunConfig.method}
    for source, table in reversed(given):
        for key in names.keys() & table.keys():
            if not isinstance(table[key], str):
                raise ValueError(f"{source}: {key} = {table[key]!r} must be a name")
            names[key] = table[key]
    benchmark, method = names["benchmark"], names["method"]
    (_, variant), defaults = find_method(method), read_benchmark(benchmark).defaults
    if unknown := sorted(set(defaults) - {"train", *known_methods()}):
        raise ValueError(f"benchmark {benchmark!r}: [defaults.{unknown[0]}] is neither train nor a method")
    tables = list(given)
    for name in dict.fromkeys((method, method_behind(method))):
        options = dict(defaults.get(name, {}))
        train = options.pop("train", {})
        if name != method:  # What makes the variant is not the other method's to set.
            options = {key: value for key, value in options.items() if key not in variant}
        tables.append((f"benchmark {benchmark!r} [defaults.{name}]", {"train": train, "options": options}))
    return settle([*tables, (f"benchmark {benchmark!r} [defaults.train]", {"train": defaults.get("train", {})})])


def settle(tables: list[Sourced]) -> RunConfig:
    """Make settings of tables, the first with each decides; ValueError names the source of a wrong value."""
    method = next((table["method"] for _, table in tables if "method" in table), RunConfig.method)
    kind, variant = find_method(method)
    values: dict[str, dict[str, Any]] = {"": {}, "train": {}, "options": {}}
    sources: dict[str, str] = {}
    for source, table in [*tables, (f"method {method}", {"options": variant})]:
        top = {key: value for key, value in table.items() if key not in ("train", "options")}
        for group, found in (("", top), ("train", table.get("train", {})), ("options", table.get("options", {}))):
            if not isinstance(found, Mapping):
                raise ValueError(f"{source}: {group} = {found!r} must be a table, [{group}]")
            for name, value in found.items():
                if name not in values[group]:
                    values[group][name] = value
                    sources[f"{group}.{name}".removeprefix(".")] = source
    _require_variant(method, variant, values["options"], sources)
    for name in values["options"]:
        known = {field.name for field in dataclasses.fields(kind.Config)}
        owners = [
            other for other, one in METHODS.items() if name in {field.name for field in dataclasses.fields(one.Config)}
        ]
        if name not in known and owners:
            place = sources[f"options.{name}"]
            flaw = f"{name} is an option of {', '.join(owners)}, and the method is {method}"
            raise ValueError(f"{place}: {flaw}; leave it out, or choose another --method")
    own = {key.removeprefix("options."): source for key, source in sources.items() if key.startswith("options.")}
    options = parse(kind.Config, values["options"], source=f"method {method}", sources=own)
    whole = {**values[""], "train": values["train"], "options": options, "sources": sources}
    return parse(RunConfig, whole, source="the run's settings", sources=sources)


def _require_variant(
    method: str, variant: Mapping[str, Any], options: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> None:
    """Check that options do not contradict what makes a variant of a method."""
    for key, value in variant.items():
        if key in options and options[key] != value:
            place = (sources or {}).get(f"options.{key}", "options")
            raise ValueError(
                f"{place}: {key} = {options[key]!r} contradicts method {method!r}, which is {method_behind(method)!r}"
                f" with {key} = {value!r}; leave it out, or take method {method_behind(method)!r}"
            )


def plain_values(config: RunConfig) -> dict[str, Any]:
    """Return as JSON values what a run is, its tasks included; where and how often it is written is no part of it."""
    values = dataclasses.asdict(config)
    for key in ("output", "checkpoint_steps", "checkpoint_minutes", "sources"):
        del values[key]
    values |= {"benchmark": absolute(config.benchmark), "more": [absolute(name) for name in config.more]}
    values["data"] = None if config.data is None else str(config.data.resolve())
    if Path(config.model).is_dir() and config.model not in EMBEDDED:
        values["model"] = str(Path(config.model).resolve())
    # As a number: a task that is added to the file later is another stream, which is to be asked for.
    own = stream_of(config.benchmark, data=config.data, order=config.order, first_tasks=config.first_tasks)
    values["first_tasks"] = len(own)
    tasks, probes = (
        {spec.name: {**dataclasses.asdict(spec), "path": spec.path.name} for spec in specs}
        for specs in (config.stream, config.probes)
    )
    return dict(json.loads(json.dumps({**values, "tasks": tasks, **({"probes": probes} if probes else {})})))


def _by_name(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its dotted name."""
    values = dataclasses.asdict(config)
    inner = {key: values.pop(key) for key in ("train", "options")}
    del values["sources"]
    return values | {f"{key}.{name}": value for key, table in inner.items() for name, value in table.items()}
