"""What a comparison is asked for, and the configuration of each run; all are checked before the first one starts."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keeplora.config import Config, parse
from keeplora.data.benchmark import read_benchmark
from keeplora.methods.registry import find_method, known_methods, method_behind, settings_of
from keeplora.runs.config import RunConfig, settle

QUICK_TASKS = 2

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompareBudget(Config):
    """What a comparison spends on each method: epochs, and settings to choose from on the validation splits."""

    epochs: int | None = None
    """Epochs of each task; those of [defaults.train] if not given."""
    search_tasks: int | None = None
    """Learn this many tasks, the first ones, in each run of the search; all if not given."""
    learning_rate: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try first, the same for every method."""
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """For a method by its name: values of its settings to try next, at the best learning rates."""
    rates_kept: int = 2
    """At how many of the best learning rates they are tried."""
    common: dict[str, Any] = field(default_factory=dict)
    """Options that every method gets, such as the rank; otherwise its own defaults."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For a method by its name: options that it gets instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.learning_rate
        if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"learning_rate = {list(rates)} must list positive numbers")
        if len(set(rates)) < len(rates):
            raise ValueError(f"learning_rate = {list(rates)} lists a number twice")
        for name in ("epochs", "search_tasks", "rates_kept"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")


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
        budget = budget_of(self.benchmark)
        if self.quick:
            budget = replace(budget, epochs=1, learning_rate=budget.learning_rate[:1], search={})
        return budget if self.epochs is None else replace(budget, epochs=self.epochs)


def budget_of(benchmark: str) -> CompareBudget:
    """Return what a benchmark's [compare] table says.

    Raises:
        ValueError: If the table is wrong; the message names the benchmark.
    """
    return parse(CompareBudget, read_benchmark(benchmark).compare, source=f"benchmark {benchmark} [compare]")


def require_valid(config: CompareConfig) -> None:
    """Make every configuration that the comparison may come to, so that a wrong one is found before any training.

    Raises:
        ValueError: If a table of the benchmark's budget is wrong, or the tasks have fewer orders than asked for.
    """
    place = f"benchmark {config.benchmark}"
    whole, budget = budget_of(config.benchmark), config.budget
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
    assert run_config(config, config.names[0], {}, seed=0, order=config.orders - 1).stream


def variations(budget: CompareBudget, name: str, settings: Settings) -> list[Settings]:
    """Return the settings with each other value that the budget lists for one of a method's own."""
    own = budget.search.get(name, {})
    return [{**settings, key: value} for key, values in own.items() for value in values]


def run_config(
    config: CompareConfig, name: str, settings: Settings, *, seed: int, order: int, is_trial: bool = False
) -> RunConfig:
    """Return one run of the comparison: the benchmark's training, the method's own defaults, and the settings."""
    budget, (_, variant), behind = config.budget, find_method(name), method_behind(name)
    place = f"benchmark {config.benchmark}"
    rate = {key: value for key, value in settings.items() if key == "learning_rate"}
    searched = f"{place} [compare.search.{settings_of(name)}]"
    label = "-".join(f"{key}{value}" for key, value in settings.items())
    folder = Path("search") / name / label if is_trial else Path("runs") / name / f"order{order}-seed{seed}"
    run = {
        "benchmark": config.benchmark,
        "model": config.model,
        "method": name,
        "seed": seed,
        "order": order,
        "first_tasks": QUICK_TASKS if config.quick else budget.search_tasks if is_trial else None,
        "evaluation": "validation" if is_trial else "test",
        "save_model": False,
        "output": config.output / folder,
    }
    of_others = [  # What makes a variant is not to be set by tables about other methods too.
        (searched, {key: value for key, value in settings.items() if key not in rate}),
        (f"{place} [compare.options.{behind}]", budget.options.get(behind, {})),
        (f"{place} [compare.common]", budget.common),
    ]
    options = [(source, {key: value for key, value in one.items() if key not in variant}) for source, one in of_others]
    options.insert(1, (f"{place} [compare.options.{name}]", budget.options.get(name, {})))
    train = [
        (f"{place} [compare]" if rate.get("learning_rate") in budget.learning_rate else searched, rate),
        (f"{place} [compare]", {} if budget.epochs is None else {"epochs": budget.epochs}),
        (f"{place} [defaults.train]", read_benchmark(config.benchmark).defaults.get("train", {})),
    ]
    return settle(
        [
            ("keeplora compare", run),
            *((source, {"options": table}) for source, table in options),
            *((source, {"train": table}) for source, table in train),
        ]
    )


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
