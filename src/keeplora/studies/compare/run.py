"""Methods side by side: equal data, epochs and search budget, several seeds and task orders, intervals.

First a search on the validation splits: the same learning rates for every method, then, at the best of them, other
values of its own settings. Then every method with what was chosen for it, on the test splits, for each seed
and order. Each run is a run directory below the output, so a comparison that was cut off goes on where it stopped, and
a method or a seed can be added later.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.registry import settings_of
from keeplora.progress import Track, silent
from keeplora.report.html import comparison_chart, comparison_page
from keeplora.runs.config import RunConfig
from keeplora.runs.disk import write_atomically
from keeplora.runs.manifest import locked
from keeplora.runs.open import read_run
from keeplora.studies.compare.claim import claim, require_free
from keeplora.studies.compare.config import CompareConfig, Settings, require_valid, run_config
from keeplora.studies.compare.intervals import Comparison, RunRow, Trial
from keeplora.studies.compare.process_pool import Workers
from keeplora.studies.compare.search import scores_of, search

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
    chart = comparison_chart(comparison)
    write_atomically(output / "compare.json", (json.dumps(comparison.to_json(), indent=1) + "\n").encode())
    write_atomically(output / "compare.png", chart)
    write_atomically(output / "report.html", comparison_page(comparison, chart).encode())
