"""Methods side by side: equal data, epochs and search budget, several seeds and task orders, intervals.

First a search on the validation splits: the same learning rates for every method, then, at the best of them, other
values of one of its own settings. Then every method with what was chosen for it, on the test splits, for each seed
and order. Each run is a run directory below the output, so a comparison that was cut off goes on where it stopped, and
a method or a seed can be added later.
"""

import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keeplora.collect import Track, silent
from keeplora.comparison import SCORES, Comparison, RunRow, Trial
from keeplora.config import Config, parse
from keeplora.ledger import Ledger
from keeplora.manifest import locked, read_manifest, write_atomically
from keeplora.methods import find_method, known_methods, method_behind, settings_of
from keeplora.report import comparison_chart, comparison_page
from keeplora.results import Results
from keeplora.run import RunConfig
from keeplora.task import CompareBudget, read_benchmark
from keeplora.train import TrainConfig
from keeplora.workers import Workers

QUICK_TASKS = 2

Settings = dict[str, Any]


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


def compare(config: CompareConfig, *, track: Track = silent) -> Comparison:
    """Search settings for every method, run each with them for every seed and order, and write the comparison.

    Raises:
        ValueError: If a method, the benchmark, the model or the data is wrong. A run that diverges is no error but a
            failure, which the comparison lists.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    with locked(config.output), Workers(config.jobs) as workers:
        trials, chosen = _search(config, workers, track)
        configs = [
            _config(config, name, chosen[settings_of(name)], seed=seed, order=order)
            for order in range(config.orders)
            for seed in range(config.seeds)
            for name in config.names
        ]
        outcomes = list(zip(configs, workers.run_all(configs, track, "runs"), strict=True))
        comparison = Comparison(
            config=_plain(config),
            trials=trials,
            chosen={name: chosen[settings_of(name)] for name in config.names},
            rows=[_row(run, outcome) for run, outcome in outcomes if isinstance(outcome, Results)],
            failures={str(run.output): outcome for run, outcome in outcomes if isinstance(outcome, str)},
        )
        _write(comparison, config.output)
    return comparison


def _search(config: CompareConfig, workers: Workers, track: Track) -> tuple[list[Trial], dict[str, Settings]]:
    """Try the budget's settings on the validation splits; return all trials, and the best settings of each method."""
    budget = config.budget
    if unknown := sorted({*budget.options, *budget.search} - set(known_methods())):
        raise ValueError(f"benchmark {config.benchmark!r}: {unknown[0]!r} in [compare] is not the name of a method")
    names = list(dict.fromkeys(settings_of(name) for name in config.names))
    searched = [name for name in names if find_method(name)[0].has_settings]
    chosen: dict[str, Settings] = {name: {} for name in names}
    if len(budget.learning_rate) == 1 and not budget.search:
        return [], {name: {"learning_rate": budget.learning_rate[0]} if name in searched else {} for name in names}
    rates = [(name, {"learning_rate": rate}) for name in searched for rate in budget.learning_rate]
    trials = _try(config, rates, workers, track, "search: learning rates")
    chosen |= {name: _best(trials, name) for name in searched}
    others = [
        (name, {**chosen[name], key: value})
        for name in searched
        for key, values in budget.search.get(name, {}).items()
        for value in values
    ]
    trials += _try(config, others, workers, track, "search: own settings")
    return trials, chosen | {name: _best(trials, name) for name in searched}


def _try(
    config: CompareConfig, settings: list[tuple[str, Settings]], workers: Workers, track: Track, what: str
) -> list[Trial]:
    configs = [_config(config, name, chosen, seed=0, order=0, is_trial=True) for name, chosen in settings]
    trials = []
    for (name, chosen), run, outcome in zip(settings, configs, workers.run_all(configs, track, what), strict=True):
        if isinstance(outcome, str):
            trials.append(Trial(name, chosen, {}, None, outcome))
        else:
            scores = _scores(run.method, outcome)
            known = [value for key in ("transfer", "average", "last") if (value := scores[key]) is not None]
            trials.append(Trial(name, chosen, scores, statistics.fmean(known)))
    return trials


def _best(trials: list[Trial], name: str) -> Settings:
    """Return the settings with the highest mean of Transfer, Average and Last; the first one where several have it."""
    finished = [trial for trial in trials if trial.method == name and trial.value is not None]
    if not finished:
        errors = "; ".join(trial.error for trial in trials if trial.method == name)
        raise ValueError(f"method {name!r} failed with every setting of the search: {errors}")
    return max(finished, key=lambda trial: trial.value or 0.0).settings


def _config(
    config: CompareConfig, name: str, settings: Settings, *, seed: int, order: int, is_trial: bool = False
) -> RunConfig:
    """Return one run of the comparison: the benchmark's training, the method's own defaults, and the settings."""
    budget, (kind, variant) = config.budget, find_method(name)
    train = dict(read_benchmark(config.benchmark).defaults.get("train", {}))
    if budget.epochs is not None:
        train["epochs"] = budget.epochs
    options = {**budget.common, **budget.options.get(method_behind(name), {}), **settings, **variant}
    if "learning_rate" in settings:
        train["learning_rate"] = options.pop("learning_rate")
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
        train=parse(TrainConfig, train, source=f"benchmark {config.benchmark} [defaults.train]"),
        options=parse(kind.Config, options, source=f"settings of {name}"),
    )


def _scores(method: str, results: Results) -> dict[str, float | None]:
    """Return the metrics that mean something for the method."""
    one_by_one = find_method(method)[0].one_by_one
    return {key: results.summary()[key] if one_by_one or key == "last" else None for key in SCORES}


def _row(config: RunConfig, results: Results) -> RunRow:
    ledger = Ledger(config.output, read_manifest(config.output))
    learning = [phase for task in ledger.tasks for name, phase in task["phases"].items() if name != "evaluate"]
    added = [task["parameters"]["added"] if not task["merged"] else 0 for task in ledger.tasks]
    heads = [task["parameters"]["added"] if task["merged"] else 0 for task in ledger.tasks]
    costs = {
        "trained_parameters": float(max(task["parameters"]["trained"] for task in ledger.tasks)),
        "added_parameters": float(added[-1] + sum(heads)),
        "seconds_per_task": sum(phase["seconds"] for phase in learning) / len(ledger.tasks),
        "peak_memory_mb": max(phase["peak_memory_mb"] for phase in learning),
    }
    return RunRow(config.method, config.seed, config.order, _scores(config.method, results), costs)


def _plain(config: CompareConfig) -> dict[str, Any]:
    plain = {**asdict(config), "methods": config.names, "budget": asdict(config.budget)}
    del plain["output"], plain["jobs"]
    return dict(json.loads(json.dumps(plain)))


def _write(comparison: Comparison, output: Path) -> None:
    chart = comparison_chart(comparison)
    write_atomically(output / "compare.json", (json.dumps(comparison.to_json(), indent=1) + "\n").encode())
    write_atomically(output / "compare.png", chart)
    write_atomically(output / "report.html", comparison_page(comparison, chart).encode())
