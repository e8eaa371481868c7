"""What a comparison is asked for, and the configuration of each run; all are checked before the first one starts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from keeplora.config import Config, parse
from keeplora.methods.registry import find_method, known_methods, method_behind, settings_of
from keeplora.runs.config import RunConfig, stream_of
from keeplora.task import CompareBudget, read_benchmark
from keeplora.training.trainer import TrainConfig

QUICK_TASKS = 2

Settings = dict[str, Any]
Tables = list[tuple[str, Settings]]
"""Tables that are merged, later ones over earlier ones, each after the place it comes from."""

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """What to compare, and where to write it."""

    benchmark: str = "mini"
    """Name of a benchmark, or path of its TOML file; its [compare] table is the budget."""
    model: str = "mini"
    """The embedded model, a hub name, or a folder."""
    methods: str = "zero_shot,lora_ft,keeplora"
    """Names of methods and variants, with commas between."""
    reference: str = "keeplora"
    """The method that the others are compared with, run by run."""
    seeds: int = 5
    """How many seeds, from 0 on."""
    orders: int = 1
    """How many orders of the tasks: the benchmark's own, and random ones."""
    output: Path = Path("runs/compare")
    """Folder of all runs, compare.json, compare.png and report.html; the same command goes on where it stopped."""
    epochs: int | None = None
    """Epochs of each task; the benchmark's budget if not given."""
    quick: bool = False
    """Try it out: the first two tasks, one epoch, one learning rate."""
    jobs: int | None = None
    """Runs at the same time; if not given, one for each processor core, or one on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise ValueError(f"methods = {self.methods!r} names no method; known methods: {', '.join(known_methods())}")
        for name in (*self.names, self.reference):
            find_method(name)
        for name in ("seeds", "orders", "jobs", "epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        was_chosen = self.reference != CompareConfig.reference and len(self.names) > 1
        if was_chosen and self.reference not in self.names:
            raise ValueError(
                f"reference = {self.reference!r} is not among the methods; add it to --methods,"
                f" or set --reference to one of {', '.join(self.names)}"
            )

    @property
    def names(self) -> list[str]:
        """The methods, one by one."""
        return list(dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip()))

    @property
    def budget(self) -> CompareBudget:
        """What is spent on each method."""
        budget = read_benchmark(self.benchmark).compare
        if self.quick:
            budget = replace(budget, epochs=1, learning_rate=budget.learning_rate[:1], search={})
        return budget if self.epochs is None else replace(budget, epochs=self.epochs)


def require_valid(config: CompareConfig) -> None:
    """Make every configuration that the comparison may come to, so that a wrong one is found before any training.

    Raises:
        ValueError: If a table of the benchmark's budget is wrong, or the tasks have fewer orders than asked for.
    """
    place = f"benchmark {config.benchmark}"
    whole, budget = read_benchmark(config.benchmark).compare, config.budget
    for table in ("search", "options"):
        if unknown := sorted(set(getattr(whole, table)) - set(known_methods())):
            known = ", ".join(known_methods())
            raise ValueError(f"{place} [compare.{table}]: unknown method {unknown[0]!r}; known methods: {known}")
    for table, options in {
        "common": whole.common,
        **{f"options.{key}": whole.options[key] for key in whole.options},
    }.items():
        if "learning_rate" in options:
            raise ValueError(f"{place} [compare.{table}]: learning_rate is searched; list it in [compare] instead")
    for name, values in whole.search.items():
        _require_searchable(f"{place} [compare.search.{name}]", name, values, whole.learning_rate)
    for name in config.names:
        rates = [{"learning_rate": rate} for rate in budget.learning_rate]
        for settings in [*rates, *variations(budget, settings_of(name), rates[0])]:
            run_config(config, settings_of(name), settings, seed=0, order=0, is_trial=True)
            run_config(config, name, settings, seed=0, order=0)
    stream_of(run_config(config, config.names[0], {}, seed=0, order=config.orders - 1))


def variations(budget: CompareBudget, name: str, settings: Settings) -> list[Settings]:
    """Return the settings with each other value that the budget lists for one of a method's own."""
    own = budget.search.get(name, {})
    return [{**settings, key: value} for key, values in own.items() for value in values]


def run_config(
    config: CompareConfig, name: str, settings: Settings, *, seed: int, order: int, is_trial: bool = False
) -> RunConfig:
    """Return one run of the comparison: the benchmark's training, the method's own defaults, and the settings."""
    budget, (kind, variant), behind = config.budget, find_method(name), method_behind(name)
    place = f"benchmark {config.benchmark}"
    rate = {key: value for key, value in settings.items() if key == "learning_rate"}
    own = {key: value for key, value in settings.items() if key not in rate}
    searched = f"{place} [compare.search.{settings_of(name)}]"
    options = [
        (f"{place} [compare.common]", budget.common),
        (f"{place} [compare.options.{behind}]", budget.options.get(behind, {})),
        (f"{place} [compare.options.{name}]", budget.options.get(name, {})),
        (searched, own),
        (f"method {name}", variant),
    ]
    train = [
        (f"{place} [defaults.train]", read_benchmark(config.benchmark).defaults.get("train", {})),
        (f"{place} [compare]", {} if budget.epochs is None else {"epochs": budget.epochs}),
        (f"{place} [compare]" if rate.get("learning_rate") in budget.learning_rate else searched, rate),
    ]
    label = "-".join(f"{key}{value}" for key, value in settings.items())
    folder = Path("search") / name / label if is_trial else Path("runs") / name / f"order{order}-seed{seed}"
    return RunConfig(
        benchmark=config.benchmark,
        model=config.model,
        method=name,
        seed=seed,
        order=order,
        first_tasks=QUICK_TASKS if config.quick else budget.search_tasks if is_trial else None,
        evaluation="validation" if is_trial else "test",
        save_model=False,
        output=config.output / folder,
        train=_parse(TrainConfig, train),
        options=_parse(kind.Config, options),
    )


def _parse(kind: type[C], tables: Tables) -> C:
    """Merge tables to a configuration; an error names the first table that is wrong."""
    try:
        return parse(kind, {key: value for _, table in tables for key, value in table.items()}, source="")
    except ValueError:
        merged: Settings = {}
        for source, table in tables:
            merged |= table
            parse(kind, merged, source=source)
        raise


def _require_searchable(source: str, name: str, table: dict[str, list[Any]], rates: tuple[float, ...]) -> None:
    kind, variant = find_method(name)
    if settings_of(name) != name:
        raise ValueError(f"{source}: {name} is never searched, it takes the settings of {settings_of(name)}")
    if not kind.has_settings:
        raise ValueError(f"{source}: {name} is never searched, it has nothing to choose")
    for key, values in table.items():
        if key in variant:
            raise ValueError(f"{source}: {key} is what makes {name}; it cannot be searched")
        everything = [*rates, *values] if key == "learning_rate" else values
        if twice := [value for value in everything if everything.count(value) > 1]:
            raise ValueError(f"{source}: {key} = {twice[0]!r} would be tried twice; list it once")
