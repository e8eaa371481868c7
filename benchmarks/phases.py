"""Time every phase of a task for KeepLoRA, plain LoRA and a naive KeepLoRA on one workload, always side by side.

Every measurement is a process of its own, and the systems take turns. A ratio is that of two measurements which ran
one after the other; of the repeats the median is given, with the lowest and the highest.

    python benchmarks/phases.py --workload mini --repeats 5
    python benchmarks/phases.py --workload vit_b16 --images 128 --classes 100 --sample-layers 2
    python benchmarks/phases.py --quick
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import tyro

import naive
import one_phase
from one_phase import PHASES, PhaseConfig, PhaseName, SystemName
from workloads import WorkloadConfig, as_flags, require_cpu

Record = dict[str, Any]
"""One measurement: system, phase, repeat, and what `one_phase.measure` returns."""

PAIRS: tuple[tuple[SystemName, SystemName], ...] = (("keeplora", "lora_ft"), ("naive", "keeplora"))
"""Which system is divided by which."""

PER = {"gradient": "example", "step": "step", "watched_step": "step", "features": "example", "evaluate": "example"}


@dataclass(frozen=True, kw_only=True)
class PhasesConfig(WorkloadConfig):
    """What to measure, and how often."""

    systems: tuple[SystemName, ...] = ("keeplora", "lora_ft", "naive")
    """The systems to measure."""
    phases: tuple[PhaseName, ...] = (
        "bases", "gradient", "initialise", "step", "watched_step", "merge", "features", "update", "evaluate",
    )  # fmt: skip
    """The phases to measure."""
    repeats: int = 5
    """How often every measurement is made."""
    sample_layers: int | None = None
    """Run bases, update and naive's initialise on so many layers of each shape, and scale up to all of them."""
    naive_features: naive.Features = "batch_mean"
    """How naive keeps its token matrices."""
    epochs: int = 1
    """Epochs of `task`, which learns a task from beginning to end and is not among the phases unless asked for."""
    output: Path = Path("runs/benchmarks")
    """Folder for the results: WORKLOAD.json and WORKLOAD.md."""
    quick: bool = False
    """Make sure in seconds that everything runs: little data, once, in one process; the figures mean nothing."""


def main(config: tyro.conf.OmitArgPrefixes[PhasesConfig]) -> None:
    """Measure, and write the results after each repeat."""
    require_cpu()
    if config.quick:
        config = dataclasses.replace(
            config, images=16, test_images=8, batch_size=8, classes=5, depth=1, repeats=1, sample_layers=1,
            hidden=256, intermediate=384,
        )  # fmt: skip
    config.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measure = in_this_process if config.quick else in_a_process
        measure(phase_config(config, "keeplora", "prepare", Path(folder)))
        records: list[Record] = []
        for repeat in range(config.repeats):
            records += one_round(config, repeat, Path(folder), measure)
            result = {"config": plain(config), "machine": machine(), "records": records}
            name = f"{config.workload}{'-quick' if config.quick else ''}"
            (config.output / f"{name}.json").write_text(json.dumps(result, indent=1))
            (config.output / f"{name}.md").write_text(table(records))
    print(table(records))


def one_round(
    config: PhasesConfig, repeat: int, folder: Path, measure: Callable[[PhaseConfig], Record]
) -> list[Record]:
    """Measure every phase of every system once; who comes first alternates."""
    records = []
    for phase in config.phases:
        systems = [system for system in config.systems if system in PHASES[phase]]
        for system in systems if repeat % 2 == 0 else reversed(systems):
            measured = measure(phase_config(config, system, phase, folder))
            records.append({"system": system, "phase": phase, "repeat": repeat} | measured)
            print(f"{repeat} {phase} {system}: {measured['seconds']:.4g} s", file=sys.stderr, flush=True)
    return records


def phase_config(config: PhasesConfig, system: SystemName, phase: Any, folder: Path | None) -> PhaseConfig:
    """Return what one measurement is told."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(WorkloadConfig)}
    shared |= {name: getattr(config, name) for name in ("sample_layers", "naive_features", "epochs")}
    return PhaseConfig(system=system, phase=phase, prepared=folder, **shared)


def in_a_process(config: PhaseConfig) -> Record:
    """Measure in a new process."""
    command = [sys.executable, str(Path(one_phase.__file__)), *as_flags(config)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def in_this_process(config: PhaseConfig) -> Record:
    """Measure here."""
    return dict(one_phase.measure(config))


def seconds_of(records: list[Record], system: str, phase: str, key: str = "seconds") -> list[float]:
    """Return by repeat the seconds of a phase per unit of its work: an example, a step, or the whole."""
    found = [record for record in records if (record["system"], record["phase"]) == (system, phase)]
    return [record[key] / record["units"] for record in sorted(found, key=lambda record: record["repeat"])]


def ratios(records: list[Record], pair: tuple[str, str], phase: str, key: str = "seconds") -> list[float]:
    """Return by repeat how many times the first system's value is the second's."""
    above, below = (seconds_of(records, system, phase, key) for system in pair)
    return [a / b for a, b in zip(above, below, strict=True)] if above and below else []


def table(records: list[Record]) -> str:
    """Return a Markdown table of the medians, and of the paired ratios with their range."""
    systems = list(dict.fromkeys(record["system"] for record in records))
    pairs = [pair for pair in PAIRS if set(pair) <= set(systems)]
    head = ["phase", *(f"{system}, s" for system in systems), *(f"{a} / {b}" for a, b in pairs)]
    head += [*(f"{a} / {b}, CPU time" for a, b in pairs), *(f"{system}, peak MiB" for system in systems)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for phase in dict.fromkeys(record["phase"] for record in records):
        row = [phase + (f" (per {PER[phase]})" if phase in PER else "")]
        row += [_median(seconds_of(records, system, phase)) for system in systems]
        row += [spread(ratios(records, pair, phase)) for pair in pairs]
        row += [spread(ratios(records, pair, phase, "cpu_seconds")) for pair in pairs]
        row += [_median(_peaks(records, system, phase)) for system in systems]
        lines.append("| " + " | ".join(row) + " |")
    repeats = 1 + max(record["repeat"] for record in records)
    note = f"{repeats} repeats; ratios are medians of paired runs (lowest to highest)."
    if any(record["scaled_from_sample"] for record in records):
        note += " Phases that work layer by layer ran on a sample of the layers; their seconds are scaled up to all."
    return "\n".join([*lines, "", note, ""])


def spread(values: list[float]) -> str:
    """Return the median of ratios and their range."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.4g}" if values else ""


def _peaks(records: list[Record], system: str, phase: str) -> list[float]:
    return [r["peak_memory_mb"] for r in records if (r["system"], r["phase"]) == (system, phase)]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def plain(config: PhasesConfig) -> dict[str, Any]:
    """Return a config as JSON values."""
    return {**dataclasses.asdict(config), "output": str(config.output)}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tyro.cli(main, description=__doc__)
