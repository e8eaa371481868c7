"""What the doctor's page looks like on a terminal."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.diagnose import Diagnosis
from keeplora.studies.doctor.dry_run import BATCHES
from keeplora.studies.doctor.findings import Finding

STYLES = {"problem": "bold red", "warning": "yellow", "note": "dim"}

PHASES = {
    "read": "read the images",
    "start": "principal directions",
    "gradient": "before each task",
    "train": "train",
    "merge": "after each task",
    "evaluate": "evaluate",
}


def diagnosis_page(found: Diagnosis) -> RenderableType:
    """Lay out a diagnosis on one page: data, model, time, disk, findings, and the verdict."""
    parts: list[RenderableType] = [_data_table(found)]
    if found.subject is not None:
        parts.append(_model_line(found))
    if found.forecast is not None:
        parts += [_time_table(found), _time_line(found)]
    if found.disk is not None:
        needs = ", ".join(f"{name} {_bytes(size)}" for name, size in found.disk.needs.items())
        free = f"{_bytes(found.disk.free)} free at {escape(str(found.disk.place))}"
        parts.append(f"Disk: {_bytes(found.disk.total)} ({needs}); {free}")
    if found.findings:
        parts.append(_finding_table(found.findings))
    parts.append(_verdict(found))
    return Group(*parts)


def _data_table(found: Diagnosis) -> Table:
    config = found.config
    table = Table(title=f"{escape(Path(config.benchmark).stem)} for {escape(config.method)}: the data")
    table.add_column("task")
    columns = ("classes", "train", config.evaluation, "images a class\n(train)", "width", "the same\nin both", "alike")
    for name in columns:
        table.add_column(name, justify="right")
    for data in found.tasks:
        table.add_row(escape(data.name), *_cells(data, config.evaluation))
    return table


def _cells(data: TaskData, evaluation: str) -> list[str]:
    counts = list(data.counts("train").values()) if "train" in data.splits else []
    numbers = [f"{len(data.splits[split]):,}" if split in data.splits else "-" for split in ("train", evaluation)]
    widths = [min(size) for seen in data.scans.values() for size in seen.sizes]
    compared = all(len(seen.prints) for seen in data.scans.values()) and len(data.scans) == 2
    shared = [str(data.exact), str(data.alike)] if compared else ["-", "-"]
    return [str(len(data.class_names) or "-"), *numbers, _range(counts), _range(widths), *shared]


def _model_line(found: Diagnosis) -> str:
    subject = found.subject
    assert subject is not None
    line = f"Model: {escape(found.config.model)}, {subject.kind}, {subject.parameters / 1e6:,.1f} M parameters"
    if subject.shapes:
        line += f", {len(subject.shapes)} layers to adapt with rank {found.config.options.rank}"
    if subject.free:
        line += f", {_range(list(subject.free.values()))} free directions a layer"
    return line


def _time_table(found: Diagnosis) -> Table:
    forecast = found.forecast
    assert forecast is not None
    table = Table(title="What a run would take")
    table.add_column("phase")
    table.add_column("time", justify="right")
    table.add_column("peak MiB", justify="right")
    for phase, seconds in forecast.seconds.items():
        peak = found.peak_memory_mb.get(phase)
        table.add_row(PHASES[phase], _duration(seconds), f"{peak:,.0f}" if peak else "")
    peak = max(found.peak_memory_mb.values())
    table.add_section()
    table.add_row("all", f"[bold]{_duration(forecast.total)}[/]", f"[bold]{peak:,.0f}[/]")
    return table


def _time_line(found: Diagnosis) -> str:
    tried = f"{found.tried} of {len(found.tasks)} tasks"
    return (
        f"An estimate, from {BATCHES - 1} batches of each phase on {tried}; writing the model is not counted. Images in"
        f" memory: {found.pixels_mb:,.0f} MiB"
    )


def _finding_table(findings: list[Finding]) -> Table:
    table = Table(title="Findings", show_header=False, box=None, padding=(0, 1, 0, 0))
    for name in ("level", "task", "what"):
        table.add_column(name, no_wrap=name != "what")
    for finding in findings:
        text = Text(finding.message)
        if finding.cure:
            text.append(f" -> {finding.cure}", style="italic")
        table.add_row(f"[{STYLES[finding.level]}]{finding.level}[/]", escape(finding.task), text)
    return table


def _verdict(found: Diagnosis) -> str:
    counts = ", ".join(f"{found.num(level)} {level}{'s' * (found.num(level) != 1)}" for level in STYLES)
    if found.num("problem"):
        return f"[bold red]not ready[/]: {counts}"
    return f"[bold green]ready[/]: {counts}"


def _range(values: list[int]) -> str:
    if not values:
        return "-"
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
