"""Methods side by side: equal data, epochs and search budget, several seeds and task orders, intervals.

First a search on the validation splits: the same learning rates for every method, then, at the best of them, other
values of its own settings. Then every method with what was chosen for it, on the test splits, for each seed
and order. Each run is a run directory below the output, so a comparison that was cut off goes on where it stopped, and
a method or a seed can be added later.
"""

import base64
import json
import os
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeplora.config import differences
from keeplora.data.stream import absolute
from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.methods.registry import find_method, settings_of
from keeplora.progress import Track, silent
from keeplora.report.charts import trade_off
from keeplora.report.html import render
from keeplora.runs.atomic_store import write_atomically
from keeplora.runs.config import RunConfig
from keeplora.runs.manifest import locked
from keeplora.runs.open import read_run
from keeplora.studies.compare.comparison import SCORES, Comparison, RunRow, Trial
from keeplora.studies.compare.config import CompareConfig, Settings, require_valid, run_config, variations
from keeplora.studies.compare.process_pool import Workers

__all__ = ["CompareConfig", "compare"]


def compare(config: CompareConfig, *, track: Track = silent) -> Comparison:
    """Search settings for every method, run each with them for every seed and order, and write the comparison.

    Raises:
        ValueError: If a method, the benchmark, the model or the data is wrong, or the folder holds something else. A
            run that diverges is no error but a failure, which the comparison lists.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison starts its own processes; start it without a launcher, and use --jobs")
    require_valid(config)
    require_free(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    with locked(config.output):
        claim(config)
        with Workers(config.jobs) as workers:
            comparison = _compared(config, workers, track)
        _write(comparison, config.output)
    return comparison


def _compared(config: CompareConfig, workers: Workers, track: Track) -> Comparison:
    trials, chosen = search(config, workers, track)
    names = [name for name in config.names if settings_of(name) in chosen]
    configs = [
        run_config(config, name, chosen[settings_of(name)], seed=seed, order=order)
        for order in range(config.orders)
        for seed in range(config.seeds)
        for name in names
    ]
    outcomes = list(zip(configs, workers.run_all(configs, track, "runs"), strict=True))
    failures = {str(run.output): outcome for run, outcome in outcomes if isinstance(outcome, str)}
    return Comparison(
        config=_plain(config, workers),
        trials=trials,
        chosen={name: chosen[settings_of(name)] for name in names},
        rows=[_row(run, outcome) for run, outcome in outcomes if isinstance(outcome, Results)],
        failures=_left_out(config, trials, chosen) | failures,
        inherits={name: settings_of(name) for name in names if settings_of(name) != name},
    )


def _left_out(config: CompareConfig, trials: list[Trial], chosen: dict[str, Settings]) -> dict[str, str]:
    """Return, by the folder of its search, why a method is left out."""
    lines: dict[str, str] = {}
    for source in dict.fromkeys(settings_of(name) for name in config.names if settings_of(name) not in chosen):
        out = [name for name in config.names if settings_of(name) == source]
        errors = dict.fromkeys(trial.error for trial in trials if trial.method == source)
        line = f"every setting of the search failed, so {', '.join(out)} is left out: {'; '.join(errors)}"
        lines[str(config.output / "search" / source)] = line
    return lines


def _row(config: RunConfig, results: Results) -> RunRow:
    directory = read_run(config.output)
    learning = [phase for task in directory.tasks for name, phase in task["phases"].items() if name != "evaluate"]
    added = [task["parameters"]["added"] if not task["merged"] else 0 for task in directory.tasks]
    heads = [task["parameters"]["added"] if task["merged"] else 0 for task in directory.tasks]
    costs = {
        "trained_parameters": float(max(task["parameters"]["trained"] for task in directory.tasks)),
        "added_parameters": float(added[-1] + sum(heads)),
        "seconds_per_task": sum(phase["seconds"] for phase in learning) / len(directory.tasks),
        "peak_memory_mb": max(phase["peak_memory_mb"] for phase in learning),
    }
    return RunRow(config.method, config.seed, config.order, scores_of(config.method, results), costs)


def _plain(config: CompareConfig, workers: Workers) -> dict[str, Any]:
    plain = {**asdict(config), "methods": config.names, "budget": asdict(config.budget)}
    del plain["output"]
    return dict(json.loads(json.dumps({**plain, "jobs": workers.jobs, "threads": workers.threads})))


def _write(comparison: Comparison, output: Path) -> None:
    scores = comparison.score
    points = {name: (scores(name, "transfer"), scores(name, "last")) for name in comparison.methods}
    chart = trade_off(points, comparison.config["reference"])
    write_atomically(output / "compare.json", (json.dumps(comparison.to_json(), indent=1) + "\n").encode())
    write_atomically(output / "compare.png", chart)
    write_atomically(output / "report.html", _page(comparison, chart).encode())


SETTINGS_FORMAT = 1

VERSIONS_OF = ("keeplora", "torch", "transformers", "peft")

OURS = {"plan.json", "search", "runs", "compare.json"}

LEFT_BY_A_START = {"lock", "plan.json.part"}

MOST_DIFFERENCES = 3


def _page(comparison: Comparison, chart: bytes) -> str:
    """Return the page of a comparison: its chart, its tables, what was tried and what was chosen."""
    return render(
        "compare.html.j2",
        comparison=comparison,
        metric_names={key: METRIC_NAMES[key] for key in SCORES},
        picture=base64.b64encode(chart).decode(),
        cell=lambda value: "-" if value is None else str(value),
    )


def require_free(folder: Path) -> None:
    """Refuse a folder that holds something, but nothing of a comparison.

    Raises:
        ValueError: If it does.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found - LEFT_BY_A_START and not found & OURS:
        raise ValueError(f"{folder} holds other files than those of a comparison; give another --output")


def claim(config: CompareConfig) -> None:
    """Write the comparison's `plan.json`, or compare with the one that is there.

    Methods, seeds, orders, jobs and the reference are no part of it: a later command may change them.

    Raises:
        ValueError: If the folder holds a comparison with another benchmark, model, `quick` or budget.
    """
    path = config.output / "plan.json"
    plan = _plan(config)
    if not path.exists():
        content = {"format": SETTINGS_FORMAT, "versions": {name: version(name) for name in VERSIONS_OF}, **plan}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text())
        newer, before = found["format"] > SETTINGS_FORMAT, {key: found[key] for key in plan}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not of keeplora: {error}") from None
    if newer:
        raise ValueError(f"{path} has format {found['format']}, newer than {SETTINGS_FORMAT}; update keeplora")
    if different := differences(before, plan):
        more = len(different) - MOST_DIFFERENCES
        shown = different[:MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"{config.output} holds another comparison ({'; '.join(shown)}); give another --output")


def _plan(config: CompareConfig) -> dict[str, Any]:
    plan = {
        "benchmark": absolute(config.benchmark),
        "model": config.model,
        "quick": config.quick,
        "budget": asdict(config.budget),
    }
    return dict(json.loads(json.dumps(plan)))


def search(config: CompareConfig, workers: Workers, track: Track) -> tuple[list[Trial], dict[str, Settings]]:
    """Try the budget's settings; return all trials, and the best settings of each method that finished one."""
    budget = config.budget
    names = list(dict.fromkeys(settings_of(name) for name in config.names))
    searched = [name for name in names if find_method(name)[0].has_settings]
    rates: list[Settings] = [{"learning_rate": rate} for rate in budget.learning_rate]
    chosen: dict[str, Settings] = {name: {} for name in names if name not in searched}
    if len(rates) == 1 and not budget.search:
        return [], {name: rates[0] if name in searched else {} for name in names}
    trials = _try(
        config, [(name, rate) for name in searched for rate in rates], workers, track, "search: learning rates"
    )
    others = [
        (name, settings)
        for name in searched
        for leading in _leading(trials, name)[: budget.rates_kept]
        for settings in variations(budget, name, leading)
    ]
    others = [trial for place, trial in enumerate(others) if trial not in others[:place]]
    trials += _try(config, others, workers, track, "search: own settings")
    best = {name: found[0] for name in searched if (found := _leading(trials, name))}
    return trials, chosen | best


def scores_of(method: str, results: Results) -> dict[str, float | None]:
    """Return the metrics that mean something for the method."""
    one_by_one = find_method(method)[0].one_by_one
    return {key: results.summary()[key] if one_by_one or key == "last" else None for key in SCORES}


def _try(
    config: CompareConfig, settings: list[tuple[str, Settings]], workers: Workers, track: Track, what: str
) -> list[Trial]:
    configs = [run_config(config, name, chosen, seed=0, order=0, is_trial=True) for name, chosen in settings]
    trials = []
    for (name, chosen), run, outcome in zip(settings, configs, workers.run_all(configs, track, what), strict=True):
        if isinstance(outcome, str):
            trials.append(Trial(name, chosen, {}, None, outcome))
        else:
            scores = scores_of(run.method, outcome)
            known = [value for key in ("transfer", "average", "last") if (value := scores[key]) is not None]
            trials.append(Trial(name, chosen, scores, statistics.fmean(known)))
    return trials


def _leading(trials: list[Trial], name: str) -> list[Settings]:
    """Return a method's settings by falling mean of Transfer, Average and Last; the earlier of equal ones first."""
    finished = [trial for trial in trials if trial.method == name and trial.value is not None]
    return [trial.settings for trial in sorted(finished, key=lambda trial: -(trial.value or 0.0))]
