"""Methods side by side on equal terms: a search on validation splits, then a run directory for each seed and order."""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from keeplora.config import differences, read_json, require
from keeplora.data.benchmark import absolute
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.registry import find_method, settings_of
from keeplora.progress import Track, silent
from keeplora.report.charts import trade_off
from keeplora.report.html import render
from keeplora.runs.atomic_store import write_atomically, write_json
from keeplora.runs.config import RunConfig
from keeplora.runs.manifest import locked
from keeplora.runs.open import read_run
from keeplora.studies.compare.comparison import COSTS, SCORES, Comparison, RunRow, Trial
from keeplora.studies.compare.config import CompareConfig, Settings, require_valid, run_config, variations
from keeplora.studies.compare.process_pool import Workers

__all__ = ["CompareConfig", "compare"]

SETTINGS = "settings.json"
SETTINGS_FORMAT = 1
VERSIONS_OF = ("keeplora", "torch", "transformers", "peft")
OURS = {SETTINGS, "search", "runs", "compare.json"}
MOST_DIFFERENCES = 3


def compare(config: CompareConfig, *, track: Track = silent) -> Comparison:
    """Search settings for every method, run each with them for every seed and order, and write the comparison.

    What is wrong with what was given is a ValueError, a run that diverges a failure that the comparison lists.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison starts its own processes; start it without a launcher, and use --jobs")
    require_valid(config)
    output = config.output
    found = {path.name for path in output.iterdir() if path.suffix != ".part"} if output.is_dir() else set()
    if found - {"lock"} and not found & OURS:
        raise ValueError(f"{output} holds other files than those of a comparison; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        require_same_settings(config)
        with Workers(config.jobs) as workers:
            comparison = _compared(config, workers, track)
        score, methods = comparison.score, comparison.methods
        chart = trade_off({name: (score(name, "transfer"), score(name, "last")) for name in methods}, config.reference)
        page = render("compare.html.j2", comparison=comparison, metric_names=SCORES, costs=COSTS, chart=chart)
        write_json(output / "compare.json", comparison.to_json())
        write_atomically(output / "compare.png", chart)
        write_atomically(output / "report.html", page.encode())
    return comparison


def require_same_settings(config: CompareConfig) -> None:
    """Write the settings of a comparison to its folder, or refuse the folder if it holds a comparison with others.

    Methods, seeds, orders, jobs and the reference are not among them: a later command may change those.
    """
    path = config.output / SETTINGS
    values = {"model": config.model, "quick": config.quick, "budget": asdict(config.budget)}
    settings: dict[str, Any] = json.loads(json.dumps({"benchmark": absolute(config.benchmark), **values}))
    if not path.exists():
        versions = {name: version(name) for name in VERSIONS_OF}
        write_json(path, {"format": SETTINGS_FORMAT, "versions": versions, **settings})
        return
    found = require(dict[str, Any], read_json(path.read_bytes(), path), str(path))
    if found.get("format") != SETTINGS_FORMAT:
        cure = "update keeplora, or give another --output"
        raise ValueError(f"{path} has format {found.get('format')}, not {SETTINGS_FORMAT}; {cure}")
    if different := differences({key: found.get(key) for key in settings}, settings):
        more = len(different) - MOST_DIFFERENCES
        shown = different[:MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"{config.output} holds another comparison ({'; '.join(shown)}); give another --output")


def _compared(config: CompareConfig, workers: Workers, track: Track) -> Comparison:
    trials, chosen = search(config, workers, track)
    sources = {name: settings_of(name) for name in config.names}
    names = [name for name in config.names if sources[name] in chosen]
    failures = {}
    for source in dict.fromkeys(sources[name] for name in config.names if name not in names):
        out = ", ".join(name for name in config.names if sources[name] == source)
        errors = "; ".join(dict.fromkeys(trial.error for trial in trials if trial.method == source))
        message = f"every setting of the search failed, so {out} is left out: {errors}"
        failures[str(config.output / "search" / source)] = message
    configs = [
        run_config(config, name, chosen[sources[name]], seed=seed, order=order)
        for order in range(config.orders)
        for seed in range(config.seeds)
        for name in names
    ]
    outcomes = list(zip(configs, workers.run_all(configs, track, "runs"), strict=True))
    settings = asdict(config) | {"methods": config.names, "budget": asdict(config.budget)}
    del settings["output"]
    return Comparison(
        config=settings | {"jobs": workers.jobs, "threads": workers.threads},
        trials=trials,
        chosen={name: chosen[sources[name]] for name in names},
        rows=[_row(run, outcome) for run, outcome in outcomes if isinstance(outcome, Results)],
        failures=failures | {str(run.output): outcome for run, outcome in outcomes if isinstance(outcome, str)},
        inherits={name: sources[name] for name in names if sources[name] != name},
    )


def _row(config: RunConfig, results: Results) -> RunRow:
    tasks = read_run(config.output).tasks
    learning = [phase for task in tasks for name, phase in task["phases"].items() if name != "evaluate"]
    # What is merged costs nothing at inference but its classifier; what is not is in the last task's count.
    added = [task["parameters"]["added"] for task in tasks if task["merged"] or task is tasks[-1]]
    costs = {
        "trained_parameters": float(max(task["parameters"]["trained"] for task in tasks)),
        "added_parameters": float(sum(added)),
        "seconds_per_task": sum(phase["seconds"] for phase in learning) / len(tasks),
        "peak_memory_mb": max(phase["peak_memory_mb"] for phase in learning),
    }
    scores = scores_of(config.method, results)
    return RunRow(config.method, config.seed, config.order, scores, costs, results.tasks, results.settings)


def search(config: CompareConfig, workers: Workers, track: Track) -> tuple[list[Trial], dict[str, Settings]]:
    """Try the budget's settings; return all trials, and the best settings of each method that finished one."""
    budget = config.budget
    names = list(dict.fromkeys(settings_of(name) for name in config.names))
    searched = [name for name in names if find_method(name)[0].has_settings]
    rates: list[Settings] = [{"learning_rate": rate} for rate in budget.learning_rate]
    if len(rates) == 1 and not budget.search:
        return [], {name: rates[0] if name in searched else {} for name in names}

    def tried(settings: list[tuple[str, Settings]], what: str) -> Iterator[Trial]:
        configs = [run_config(config, name, values, seed=0, order=0, is_trial=True) for name, values in settings]
        outcomes = workers.run_all(configs, track, f"search: {what}")
        for (name, values), outcome in zip(settings, outcomes, strict=True):
            if isinstance(outcome, str):
                yield Trial(name, values, {}, None, outcome)
            else:
                scores = scores_of(name, outcome)
                known = [value for key in ("transfer", "average", "last") if (value := scores[key]) is not None]
                yield Trial(name, values, scores, statistics.fmean(known))

    trials = [*tried([(name, rate) for name in searched for rate in rates], "learning rates")]
    others: list[tuple[str, Settings]] = []
    for name in searched:
        for leading in _leading(trials, name)[: budget.rates_kept]:
            others += [(name, new) for new in variations(budget, name, leading) if (name, new) not in others]
    trials += tried(others, "own settings")
    best = {name: found[0] for name in searched if (found := _leading(trials, name))}
    return trials, best | {name: {} for name in names if name not in searched}


def _leading(trials: list[Trial], name: str) -> list[Settings]:
    """Return a method's settings by falling mean of Transfer, Average and Last; the earlier of equal ones first."""
    finished = [trial for trial in trials if trial.method == name and trial.value is not None]
    return [trial.settings for trial in sorted(finished, key=lambda trial: -(trial.value or 0.0))]


def scores_of(method: str, results: Results) -> dict[str, float | None]:
    """Return the metrics that mean something for the method."""
    one_by_one = find_method(method)[0].one_by_one
    return {key: results.summary()[key] if one_by_one or key == "last" else None for key in SCORES}
