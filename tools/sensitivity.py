"""Measure how Transfer, Average and Last of KeepLoRA on `mini` depend on its options, one at a time; draw one figure.

Every other setting is what `keeplora compare` chose, on the validation splits:

    keeplora compare --benchmark mini --methods keeplora --seeds 5 --output runs/compare
    python tools/sensitivity.py --compare runs/compare --output runs/sensitivity
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from keeplora.cli.progress import Display
from keeplora.config import parse
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.runs.config import RunConfig
from keeplora.runs.manifest import read_manifest
from keeplora.studies.compare.process_pool import Workers
from keeplora.training.trainer import TrainConfig

VISION = (0.0, 0.5, 0.7, 0.85, 0.95)
TEXT = (0.0, 0.2, 0.5, 0.85)
FEATURES = (0.8, 0.9, 0.95, 0.99)
RANKS = (4, 8, 16, 32)
ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
METRICS = ("transfer", "average", "last")

Option = dict[str, Any]


def main() -> None:
    """Make the runs that are missing; print a table and write `sensitivity.png` and `sensitivity.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, default=Path("runs/compare"), help="folder of a comparison")
    parser.add_argument("--output", type=Path, default=Path("runs/sensitivity"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument("--jobs", type=int, help="runs at the same time")
    arguments = parser.parse_args()
    chosen = read_manifest(arguments.compare / "runs/keeplora/order0-seed0")["config"]
    panels = panels_around({**chosen["options"], "learning_rate": chosen["train"]["learning_rate"]})
    configs = {
        config.output: config
        for points in panels.values()
        for option in points.values()
        for config in configs_of(chosen, option, arguments)
    }
    with Display(Console()) as display, Workers(arguments.jobs) as workers:
        outcomes = dict(zip(configs, workers.run_all(list(configs.values()), display.track, "runs"), strict=True))
    curves = {
        panel: {
            str(value): mean_of([outcomes[config.output] for config in configs_of(chosen, option, arguments)])
            for value, option in points.items()
        }
        for panel, points in panels.items()
    }
    (arguments.output / "sensitivity.json").write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, arguments.output / "sensitivity.png")
    print(table(curves))


def panels_around(base: Option) -> dict[str, dict[float, Option]]:
    """Return for each panel of the figure the options at each of its points; the rank keeps alpha / rank."""
    energy, scaling = base["weight_energy"], base["alpha"] / base["rank"]
    return {
        "weight_energy, vision": {v: {**base, "weight_energy": {**energy, "vision": v}} for v in VISION},
        "weight_energy, text": {v: {**base, "weight_energy": {**energy, "text": v}} for v in TEXT},
        "feature_energy": {v: {**base, "feature_energy": v} for v in FEATURES},
        "rank (alpha / rank kept)": {v: {**base, "rank": v, "alpha": scaling * v} for v in RANKS},
        "alpha": {v: {**base, "alpha": v} for v in ALPHAS},
        "learning_rate": {v: {**base, "learning_rate": v} for v in RATES},
    }


def configs_of(chosen: dict[str, Any], option: Option, arguments: argparse.Namespace) -> list[RunConfig]:
    """Return the runs of one point, one for each seed; equal points of two panels are the same runs."""
    options = dict(option)
    energy, rate = options["weight_energy"], options.pop("learning_rate")
    parts = (energy["vision"], energy["text"], options["feature_energy"], options["rank"], options["alpha"], rate)
    label = "-".join(f"{name}{value:g}" for name, value in zip("vtfral", parts, strict=True))
    return [
        RunConfig(
            benchmark=chosen["benchmark"],
            model=chosen["model"],
            method=chosen["method"],
            seed=seed,
            evaluation="validation",
            save_model=False,
            output=arguments.output / f"{label}-seed{seed}",
            train=parse(TrainConfig, {**chosen["train"], "learning_rate": rate}, source="the comparison"),
            options=parse(KeepLoRAConfig, options, source="the comparison"),
        )
        for seed in range(arguments.seeds)
    ]


def mean_of(outcomes: list[Results | str]) -> dict[str, float] | str:
    """Return the metrics, averaged over seeds; or why a run failed."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failures:
        return failures[0]
    summaries = [outcome.summary() for outcome in outcomes]
    return {key: statistics.fmean(summary[key] for summary in summaries) for key in METRICS}


def draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw one panel for each option."""
    figure = Figure(figsize=(15, 3.5), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(curves), sharey=True)
    for axis, (panel, points) in zip(axes, curves.items(), strict=True):
        known = {value: scores for value, scores in points.items() if not isinstance(scores, str)}
        for key, color in zip(METRICS, ("tab:blue", "tab:gray", "tab:red"), strict=True):
            heights = [scores[key] for scores in known.values()]
            axis.plot([float(value) for value in known], heights, "o-", color=color, label=key.capitalize())
        axis.set_xlabel(panel)
        axis.set_xscale("log" if panel.startswith(("rank", "alpha", "learning")) else "linear")
        axis.set_xticks([float(value) for value in known], list(known), rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% on the validation splits")
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def table(curves: dict[str, dict[str, Any]]) -> str:
    """Return the curves as Markdown."""
    lines = ["| option | value | Transfer | Average | Last |", "|---|---|---|---|---|"]
    for panel, points in curves.items():
        for value, scores in points.items():
            failed = isinstance(scores, str)
            cells = f"{scores} | | " if failed else " | ".join(f"{scores[key]:.1f}" for key in METRICS)
            lines.append(f"| {panel} | {value} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
