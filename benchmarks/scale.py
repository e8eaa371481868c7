"""Measure how the cost of a KeepLoRA task grows along one axis at a time, the others at their smallest sizes.

The axes: tasks learned before (what grows is the protected bases), classes, image size, width and depth of the
towers. A point of an axis is a process of its own, in which the phases are timed one after the other; every repeat goes
over all points again, in turns forwards and backwards. Writes scale.json, scale.md and scale.png.

    python benchmarks/scale.py --repeats 3
    python benchmarks/scale.py --axes width depth --images 16
    python benchmarks/scale.py --quick
"""

import dataclasses
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import one_phase
from one_phase import PhaseConfig
from phases import Record, machine, plain, seconds_of
from workloads import WorkloadConfig, load, require_cpu

AxisName = Literal["tasks", "classes", "image", "width", "depth"]

AXES: dict[AxisName, tuple[str, tuple[int, ...], str]] = {
    "tasks": ("learned_tasks", (1, 3, 6, 11), "tasks learned before"),
    "classes": ("classes", (10, 30, 100, 300, 1000), "classes"),
    "image": ("image_size", (112, 224, 336), "side of the images, pixels"),
    "width": ("width", (256, 512, 768, 1024), "width of both towers"),
    "depth": ("depth", (2, 4, 8, 12), "blocks of each tower"),
}
"""The field of the workload that an axis changes, the values it takes, and what they are called."""

SERIES: dict[str, tuple[tuple[str, str], ...]] = {
    "gradient, per example": (("gradient", "keeplora"),),
    "features, per example": (("features", "keeplora"),),
    "evaluate, per example": (("evaluate", "keeplora"),),
    "initialise + update, per task": (("initialise", "keeplora"), ("update", "keeplora")),
    "step, per step": (("step", "keeplora"),),
    "step of lora_ft, per step": (("step", "lora_ft"),),
}
"""What a curve shows: the seconds per unit of these phases and systems, added up."""

CHANGES_THE_MODEL = ("initialise", "step")

Point = tuple[AxisName, int]


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(WorkloadConfig):
    """What to measure; the sizes are those of the points where their own axis does not change them."""

    workload: Literal["vit_b16"] = "vit_b16"
    """CLIP ViT-B/16: the one workload that has every axis."""
    images: int = 8
    """Training examples."""
    test_images: int = 8
    """Held-out examples."""
    classes: int = 30
    """Classes of the task, each with a prompt."""
    batch_size: int = 8
    """Examples in a batch."""
    depth: int | None = 1
    """Blocks of each tower."""
    axes: tuple[AxisName, ...] = ("tasks", "classes", "image", "width", "depth")
    """The axes to go along."""
    repeats: int = 3
    """How often every point is measured; the median counts."""
    output: Path = Path("runs/benchmarks")
    """Folder for scale.json, scale.md and scale.png."""
    quick: bool = False
    """Make sure in seconds that everything runs: two points an axis, tiny, once, in one process; the figures mean
    nothing."""


def main(config: tyro.conf.OmitArgPrefixes[ScaleConfig]) -> None:
    """Measure, write the results after every point, and print the table."""
    require_cpu()
    if config.quick:
        config = dataclasses.replace(
            config, images=2, test_images=2, batch_size=2, classes=3, depth=1, repeats=1, image_size=32, width=64
        )
    config.output.mkdir(parents=True, exist_ok=True)
    name = f"scale{'-quick' if config.quick else ''}"
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        for found in rounds(config, Path(folder)):
            records += found
            result = {"config": plain(config), "machine": machine(), "records": records}
            (config.output / f"{name}.json").write_text(json.dumps(result, indent=1))
    (config.output / f"{name}.md").write_text(table(records))
    draw(records, config.output / f"{name}.png")
    print(table(records))


def rounds(config: ScaleConfig, folder: Path) -> Iterator[list[Record]]:
    """Measure every point once a round, and say how long the rest will take."""
    points = points_of(config)
    seconds: dict[Point, float] = {}
    for repeat in range(config.repeats):
        for done, point in enumerate(points if repeat % 2 == 0 else points[::-1], start=1):
            axis, value = point
            configs = phase_configs(config, point, folder / f"{axis}-{value}")
            since = time.perf_counter()
            found = measure_point(configs) if config.quick else in_a_process(measure_point, configs)
            seconds[point] = time.perf_counter() - since
            _say_progress(config, points, seconds, repeat * len(points) + done, point)
            yield [{"axis": axis, "value": value, "repeat": repeat} | record for record in found]


def points_of(config: ScaleConfig) -> list[Point]:
    """Return the points of the chosen axes: of each the first two if quick."""
    return [(axis, value) for axis in config.axes for value in AXES[axis][1][: 2 if config.quick else None]]


def phase_configs(config: ScaleConfig, point: Point, prepared: Path) -> list[PhaseConfig]:
    """Return what each measurement of a point is told; those that change the model come last."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(WorkloadConfig)}
    shared |= {AXES[point[0]][0]: point[1], "sample_layers": 1, "prepared": prepared}
    measured = [pair for pairs in SERIES.values() for pair in pairs]
    measured.sort(key=lambda pair: CHANGES_THE_MODEL.index(pair[0]) if pair[0] in CHANGES_THE_MODEL else -1)
    both: list[tuple[Any, Any]] = [("prepare", "keeplora"), *measured]
    return [PhaseConfig(phase=phase, system=system, **shared) for phase, system in both]


def measure_point(configs: list[PhaseConfig]) -> list[Record]:
    """Time the phases of a point; what is prepared lies in its folder from the second repeat on."""
    one_phase.measure(configs[0])
    workload = load(configs[0])
    found = []
    for config in configs[1:]:
        own = load(config) if config.phase in CHANGES_THE_MODEL else workload
        measured = one_phase.measure(config, own)
        kept = {key: measured[key] for key in ("seconds", "cpu_seconds", "units", "scaled_from_sample")}
        found.append({"system": config.system, "phase": config.phase} | kept)
    return found


def in_a_process(work: Callable[[list[PhaseConfig]], list[Record]], configs: list[PhaseConfig]) -> list[Record]:
    """Do some work in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_be_quiet) as pool:
        return pool.submit(work, configs).result()


def _be_quiet() -> None:
    """Silence what narrow layers and short gradients warn of: these are no runs to learn from."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _say_progress(
    config: ScaleConfig, points: list[Point], seconds: dict[Point, float], done: int, point: Point
) -> None:
    """Print how far it is; a point takes what it took last time, one not measured yet what the others took."""
    usual = statistics.mean(seconds.values())
    total = len(points) * config.repeats
    full_rounds, rest = divmod(total - done, len(points))
    left = full_rounds * sum(seconds.get(each, usual) for each in points)
    repeat = (done - 1) // len(points)
    order = points if repeat % 2 == 0 else points[::-1]
    left += sum(seconds.get(each, usual) for each in order[len(points) - rest :]) if rest else 0.0
    text = f"[{done}/{total}] {point[0]} {point[1]}: {seconds[point]:.1f} s, about {left / 60:.1f} minutes left"
    print(text, file=sys.stderr, flush=True)


def curve(records: list[Record], axis: str, series: str) -> dict[int, list[float]]:
    """Return by value of an axis the seconds of every repeat."""
    own = [record for record in records if record["axis"] == axis]
    found = {}
    for value in sorted({record["value"] for record in own}):
        here = [record for record in own if record["value"] == value]
        parts = [seconds_of(here, system, phase) for phase, system in SERIES[series]]
        found[value] = [sum(values) for values in zip(*parts, strict=True)]
    return found


def exponent(medians: dict[int, float]) -> float:
    """Return the slope between the ends of a curve on logarithmic axes: 1 where cost grows in proportion."""
    (first, low), *_, (last, high) = medians.items()
    return math.log(high / low) / math.log(last / first)


def table(records: list[Record]) -> str:
    """Return for each axis a Markdown table of the median seconds, and of the exponent between its ends."""
    lines = []
    for axis in dict.fromkeys(record["axis"] for record in records):
        values = sorted({record["value"] for record in records if record["axis"] == axis})
        head = [AXES[axis][2], *map(str, values), "exponent"]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for series in SERIES:
            medians = {value: statistics.median(found) for value, found in curve(records, axis, series).items()}
            row = [series, *(f"{median:.3g}" for median in medians.values()), f"{exponent(medians):.2f}"]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    repeats = 1 + max(record["repeat"] for record in records)
    lines.append(f"Median seconds of {repeats} repeats; update ran on a layer of each shape, and is scaled up to all.")
    return "\n".join([*lines, ""])


def draw(records: list[Record], file: Path) -> None:
    """Draw a panel for each axis: median seconds on logarithmic axes, and the range of the repeats."""
    axes = list(dict.fromkeys(record["axis"] for record in records))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.0 + 2.7 * len(axes), 3.6), layout="constrained", dpi=140)
        panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
        for panel, axis in zip(panels, axes, strict=True):
            _draw_axis(panel, records, axis)
        panels[0].set_ylabel("seconds")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(axes)), frameon=False)
        figure.savefig(file)


def _draw_axis(panel: Axes, records: list[Record], axis: AxisName) -> None:
    for index, series in enumerate(SERIES):
        found = curve(records, axis, series)
        values, color = list(found), matplotlib.colormaps["tab10"](index)
        medians = [statistics.median(seconds) for seconds in found.values()]
        line = "--" if "lora_ft" in series else "-"
        panel.plot(values, medians, line, marker="o", markersize=3, linewidth=1.2, color=color, label=series)
        panel.fill_between(
            values, *zip(*((min(s), max(s)) for s in found.values()), strict=True), color=color, alpha=0.15
        )
    panel.set(xscale="log", yscale="log", xlabel=AXES[axis][2])
    panel.set_xticks(values, list(map(str, values)))
    panel.minorticks_off()
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tyro.cli(main, description=__doc__)
