"""What a comparison is asked for, and the configuration of each run; all are checked before the first one starts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from keeplora.config import Config, PositiveNumber, parse
from keeplora.data.benchmark import read_benchmark
from keeplora.methods.registry import find_method, known_methods, method_behind, settings_of
from keeplora.runs.config import RunConfig, settle

QUICK_TASKS = 2

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompareBudget(Config):
    """What a comparison spends on each method: epochs, and settings to choose from on the validation splits."""

    epochs: PositiveInt | None = None  # Epochs of each task; those of [defaults.train] if not given.
    search_tasks: PositiveInt | None = None
    """Learn this many tasks, the first ones, in each run of the search; all if not given."""
    learning_rate: Annotated[tuple[PositiveNumber, ...], Field(min_length=1)] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try first, the same for every method."""
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """For a method by its name: values of its settings to try next, at the best learning rates."""
    rates_kept: PositiveInt = 2  # At how many of the best learning rates they are tried.
    common: Settings = field(default_factory=dict)
    """Options that every method gets, such as the rank; otherwise its own defaults."""
    options: dict[str, Settings] = field(default_factory=dict)
    """For a method by its name: options that it gets instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.learning_rate)) < len(self.learning_rate):
            raise ValueError(f"learning_rate = {list(self.learning_rate)} lists a number twice")


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
    seeds: PositiveInt = 5
    """How many seeds, from 0 on."""
    orders: PositiveInt = 1
    """How many orders of the tasks: the benchmark's own, and random ones."""
    output: Path = Path("runs/compare")
    """Folder of all runs, compare.json, compare.png and report.html; the same command resumes them."""
    epochs: PositiveInt | None = None
    """Epochs of each task; the benchmark's budget if not given."""
    quick: bool = False
    """Try it out: the first two tasks, one epoch, one learning rate."""
    jobs: PositiveInt | None = None
    """Runs at the same time; if not given, one for each processor core, or one on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise ValueError(f"methods = {self.methods!r} names no method; known methods: {', '.join(known_methods())}")
        for name in (*self.names, self.reference):
            find_method(name)
        if self.reference not in (CompareConfig.reference, *self.names) and len(self.names) > 1:
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
    """Return what a benchmark's [compare] table says; a wrong one is an error that names the benchmark."""
    return parse(CompareBudget, read_benchmark(benchmark).compare, source=f"benchmark {benchmark} [compare]")


def require_valid(config: CompareConfig) -> None:
    """Make every configuration that the comparison may come to, so that a wrong one is found before any training."""
    place, known = f"benchmark {config.benchmark} [compare", known_methods()
    whole, budget = budget_of(config.benchmark), config.budget
    for table, methods in (("search", {*whole.search}), ("options", {*whole.options})):
        if unknown := sorted(methods - {*known}):
            raise ValueError(f"{place}.{table}]: unknown method {unknown[0]!r}; known methods: {', '.join(known)}")
    options = {"common": whole.common} | {f"options.{name}": own for name, own in whole.options.items()}
    if wrong := [table for table, own in options.items() if "learning_rate" in own]:
        raise ValueError(f"{place}.{wrong[0]}]: learning_rate is searched; list it in [compare] instead")
    for name, values in whole.search.items():
        _require_searchable(f"{place}.search.{name}]", name, values, whole.learning_rate)
    for name in config.names:
        rates = [{"learning_rate": rate} for rate in budget.learning_rate]
        for settings in [*rates, *variations(budget, settings_of(name), rates[0])]:
            run_config(config, settings_of(name), settings, seed=0, order=0, is_trial=True)
            run_config(config, name, settings, seed=0, order=0)
    assert run_config(config, config.names[0], {}, seed=0, order=config.orders - 1).stream


def _require_searchable(source: str, name: str, table: dict[str, list[Any]], rates: tuple[float, ...]) -> None:
    kind, variant = find_method(name)
    if settings_of(name) != name:
        raise ValueError(f"{source}: {name} is never searched, it takes the settings of {settings_of(name)}")
    if not kind.has_settings:
        raise ValueError(f"{source}: {name} is never searched, it has nothing to choose")
    for key, values in table.items():
        if key in variant:
            raise ValueError(f"{source}: {key} is what makes {name}; it cannot be searched")
        tried = [*rates, *values] if key == "learning_rate" else values
        if twice := [value for value in tried if tried.count(value) > 1]:
            raise ValueError(f"{source}: {key} = {twice[0]!r} would be tried twice; list it once")


def variations(budget: CompareBudget, name: str, settings: Settings) -> list[Settings]:
    """Return the settings with each other value that the budget lists for one of a method's own."""
    return [{**settings, key: value} for key, values in budget.search.get(name, {}).items() for value in values]


def run_config(
    config: CompareConfig, name: str, settings: Settings, *, seed: int, order: int, is_trial: bool = False
) -> RunConfig:
    """Return one run of the comparison: the benchmark's training, the method's own defaults, and the settings."""
    budget, (_, variant), behind = config.budget, find_method(name), method_behind(name)
    place = f"benchmark {config.benchmark}"
    searched = f"{place} [compare.search.{settings_of(name)}]"
    label = "-".join(f"{key}{value}" for key, value in settings.items())
    run = {
        "benchmark": config.benchmark,
        "model": config.model,
        "method": name,
        "seed": seed,
        "order": order,
        "first_tasks": QUICK_TASKS if config.quick else budget.search_tasks if is_trial else None,
        "evaluation": "validation" if is_trial else "test",
        "save_model": False,
        "output": config.output / (f"search/{name}/{label}" if is_trial else f"runs/{name}/order{order}-seed{seed}"),
    }
    rate = {key: value for key, value in settings.items() if key == "learning_rate"}
    # What makes a variant is not to be set by tables about other methods too.
    own, of_behind, common = (
        {key: value for key, value in table.items() if key not in (*variant, *rate)}
        for table in (settings, budget.options.get(behind, {}), budget.common)
    )
    rate_source = f"{place} [compare]" if rate.get("learning_rate") in budget.learning_rate else searched
    epochs = {} if budget.epochs is None else {"epochs": budget.epochs}
    return settle(
        [
            ("keeplora compare", run),
            (searched, {"options": own}),
            (f"{place} [compare.options.{name}]", {"options": budget.options.get(name, {})}),
            (f"{place} [compare.options.{behind}]", {"options": of_behind}),
            (f"{place} [compare.common]", {"options": common}),
            (rate_source, {"train": rate}),
            (f"{place} [compare]", {"train": epochs}),
            (f"{place} [defaults.train]", {"train": read_benchmark(config.benchmark).defaults.get("train", {})}),
        ]
    )
