"""Compose the cost of a whole task from the phases that `phases.py` measured.

No task of this length was run: seconds per example and per step are multiplied by how many there are. The principal
bases, found once for a stream, are listed apart; writing the run directory is left out.

    python benchmarks/whole_task.py runs/benchmarks/vit_b16.json --images 128 --epochs 10
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from keeplora.layers.distributed import share_of
from phases import PAIRS, Record, seconds_of, spread


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """How long the task is."""

    results: Annotated[Path, tyro.conf.Positional]
    """What phases.py wrote."""
    images: int = 128
    """Training examples."""
    test_images: int = 128
    """Held-out examples."""
    epochs: int = 10
    """Passes over the training examples."""
    gradient_share: float = 1.0
    """Share of the training examples that KeepLoRA's gradient is taken from."""
    features: Literal["pass", "last_epoch"] = "pass"
    """Whether KeepLoRA's features take a pass of their own, or are collected in the last epoch."""
    evaluations: int = 1
    """How many tasks of this size are evaluated after it."""
    key: str = "seconds"
    """seconds, or cpu_seconds of all threads together."""


def main(config: tyro.conf.OmitArgPrefixes[TaskConfig]) -> None:
    """Print the cost of a task by system, and the ratios."""
    if not config.results.exists():
        raise SystemExit(f"{config.results} does not exist; let phases.py write it first")
    result = json.loads(config.results.read_text())
    print(report(result, config))


def report(result: dict[str, Any], config: TaskConfig) -> str:
    """Return a Markdown table of the composed seconds of each phase, the totals, their ratios and the peaks."""
    records: list[Record] = result["records"]
    systems = list(dict.fromkeys(record["system"] for record in records))
    counts = {system: counts_of(config, result["config"]["batch_size"], system) for system in systems}
    totals = {system: totals_of(records, system, counts[system], config.key) for system in systems}
    peaks = {system: peaks_of(records, system, counts[system]) for system in systems}
    lines = ["| phase | " + " | ".join(systems) + " |", "|" + " --- |" * (1 + len(systems))]
    for phase in dict.fromkeys(phase for own in counts.values() for phase in own):
        values = [seconds_of(records, system, phase, config.key) for system in systems]
        numbers = [counts[system].get(phase, 0) for system in systems]
        row = [f"{n * statistics.median(v):.4g}" if v and n else "" for n, v in zip(numbers, values, strict=True)]
        lines.append(f"| {phase} | " + " | ".join(row) + " |")
    lines.append("| **total** | " + " | ".join(f"{statistics.median(totals[name]):.4g}" for name in systems) + " |")
    lines.append("| peak MiB | " + " | ".join(f"{statistics.median(peaks[name]):.0f}" for name in systems) + " |")
    lines.append("")
    for above, below in PAIRS:
        if above in totals and below in totals:
            time = spread([a / b for a, b in zip(totals[above], totals[below], strict=True)])
            memory = spread([a / b for a, b in zip(peaks[above], peaks[below], strict=True)])
            lines.append(f"- {above} / {below}: {config.key} {time}, peak memory {memory}")
    repeats = len(next(iter(totals.values())))
    task = f"{config.images} images, {config.epochs} epochs, evaluations: {config.evaluations}"
    options = f"gradient_share {config.gradient_share:g}, features by {config.features.replace('_', ' ')}"
    lines += ["", f"Composed, not run: {task}; {options}. From {repeats} repeats."]
    for system in systems:
        if missing := [phase for phase, n in counts[system].items() if n and not seconds_of(records, system, phase)]:
            lines.append(f"{system} has no figure for {', '.join(missing)}: not part of it, or not measured.")
    return "\n".join(lines)


def counts_of(config: TaskConfig, batch_size: int, system: str) -> dict[str, int]:
    """Return how many units of each phase a task takes of a system."""
    batches = math.ceil(config.images / batch_size)
    takes_options = system == "keeplora"
    watches = takes_options and config.features == "last_epoch"
    seen = batch_size * share_of(batches, config.gradient_share)
    return {
        "gradient": min(config.images, seen) if takes_options else config.images,
        "initialise": 1,
        "step": (config.epochs - watches) * batches,
        "watched_step": watches * batches,
        "merge": 1,
        "features": 0 if watches else config.images,
        "update": 1,
        "evaluate": config.evaluations * config.test_images,
    }


def totals_of(records: list[Record], system: str, counts: dict[str, int], key: str) -> list[float]:
    """Return by repeat the seconds of a whole task."""
    by_phase = {phase: seconds_of(records, system, phase, key) for phase, count in counts.items() if count}
    repeats = max(map(len, by_phase.values()))
    return [
        sum(counts[phase] * values[repeat] for phase, values in by_phase.items() if values) for repeat in range(repeats)
    ]


def peaks_of(records: list[Record], system: str, counts: dict[str, int]) -> list[float]:
    """Return by repeat the highest peak of all phases that a task has."""
    own = [record for record in records if record["system"] == system and counts.get(record["phase"])]
    repeats = sorted({record["repeat"] for record in own})
    return [max(record["peak_memory_mb"] for record in own if record["repeat"] == repeat) for repeat in repeats]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
