"""The command that examines a run before it is started, a typed function, and what its page looks like."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keeplora.cli.flags import flag, run_flags, sourced
from keeplora.cli.progress import Display
from keeplora.cli.tables import WITHOUT_LINES, table
from keeplora.runs.config import resolve
from keeplora.studies.doctor.diagnose import Diagnosis, diagnose
from keeplora.studies.doctor.dry_run import BATCHES
from keeplora.studies.doctor.findings import Finding
from keeplora.studies.doctor.model import Subject

console = Console()

STYLES = {"problem": "bold red", "warning": "yellow", "note": "dim"}

PHASES = {
    "read": "read the images",
    "start": "principal directions",
    "gradient": "before each task",
    "train": "train",
    "merge": "after each task",
    "evaluate": "evaluate",
}


def doctor(settings: Any, train: Any, method: Any, ablations: Any, others: Any) -> None:
    """Examine data, model, time, memory and disk of a run before hours are spent on it."""
    given = dict(settings)
    duplicates, is_strict = given.pop("duplicates", True), given.pop("strict", False)
    config = resolve(*sourced(given, train, {**method, **ablations, **others}))
    with Display(console) as display:
        found = diagnose(config, duplicates=duplicates, track=display.track)
    console.print(diagnosis_page(found))
    if code := found.exit_code(strict=is_strict):
        sys.exit(code)


doctor.__annotations__ |= run_flags(
    config=flag(Path, "TOML file with the settings of the run."),
    duplicates=flag(
        bool,
        "Decode every image and look for the same or alike ones in two splits; without it only headers are read.",
        "(default: True)",
    ),
    strict=flag(bool, "Let warnings count as problems in the exit code.", "(default: False)"),
)


def diagnosis_page(found: Diagnosis) -> RenderableType:
    """Lay out a diagnosis on one page: data, model, time, disk, findings, and the verdict."""
    parts: list[RenderableType] = [_data_table(found)]
    if found.subject is not None:
        parts.append(_model_line(found, found.subject))
    if any(data.prompts for data in found.tasks):
        parts.append(_prompt_table(found))
    if found.estimate:
        tried = f"{BATCHES - 1} batches of each phase on {len(found.dry_run.paces)} of {len(found.tasks)} tasks"
        memory = f"Images in memory: {found.pixels_mb:,.0f} MiB"
        estimate = f"An estimate, from {tried}; writing the model is not counted. {memory}"
        parts += [_time_table(found.estimate, found.dry_run.peak_memory_mb), estimate]
    if found.disk is not None:
        needs = ", ".join(f"{name} {_bytes(size)}" for name, size in found.disk.needs.items())
        free = f"{_bytes(found.disk.free)} free at {escape(str(found.disk.folder))}"
        parts.append(f"Disk: {_bytes(found.disk.total)} ({needs}); {free}")
    if found.findings:
        parts.append(_finding_table(found.findings))
    counts = ", ".join(f"{found.num(level)} {level}{'s' * (found.num(level) != 1)}" for level in STYLES)
    verdict = "[bold red]not ready[/]" if found.num("problem") else "[bold green]ready[/]"
    return Group(*parts, f"{verdict}: {counts}")


def _data_table(found: Diagnosis) -> Table:
    splits, rows = ("train", found.config.evaluation), []
    for data in found.tasks:
        numbers = [f"{data.sizes[split]:,}" if split in data.sizes else "-" for split in splits]
        widths = [min(look.size) for looks in data.looks.values() for look in looks if not look.error]
        compared = [split for split, looks in data.looks.items() if any(look.print is not None for look in looks)]
        shared = [str(data.exact), str(data.alike)] if len(compared) == 2 else ["-", "-"]
        sizes = _range(list(data.class_sizes.values()))
        rows.append((data.spec.name, len(data.class_names) or "-", *numbers, sizes, _range(widths), *shared))
    headings = ("task", "classes", *splits, "images a class\n(train)", "width", "the same\nin both", "alike")
    return table(f"{Path(found.config.benchmark).stem} for {found.config.method}: the data", headings, rows)


def _model_line(found: Diagnosis, subject: Subject) -> str:
    kind = getattr(getattr(subject.model, "config", None), "model_type", type(subject.model).__name__)
    line = f"Model: {escape(found.config.model)}, {kind}, {subject.parameters / 1e6:,.1f} M parameters"
    if subject.shapes:
        line += f", {len(subject.shapes)} layers to adapt with rank {found.config.options.rank}"
    if subject.free:
        line += f", {_range(list(subject.free.values()))} free directions a layer"
    return line


def _prompt_table(found: Diagnosis) -> Table:
    """Tabulate a few prompts of each task, and what the untouched model makes of them."""
    rows = []
    for data in found.tasks:
        score, batches = found.dry_run.untouched.get(data.spec.name, (None, ""))
        rows.append((data.spec.name, "\n".join(data.prompts), "-" if score is None else f"{score:.1f}", batches))
    headings = ("task", "prompts, such as", "untouched\nmodel, in %", "batches")
    made = table("What the model is asked", headings, rows, left=2)
    made.caption = "untouched: on batches from all over the split; near chance, try other templates or class_names"
    return made


def _time_table(seconds: dict[str, float], peak_memory_mb: dict[str, float]) -> Table:
    peaks = {phase: f"{peak:,.0f}" for phase, peak in peak_memory_mb.items()}
    rows = [(name, _duration(seconds[phase]), peaks.get(phase, "")) for phase, name in PHASES.items()]
    made = table("What a run would take", ("phase", "time", "peak MiB"), rows)
    made.add_section()
    made.add_row("all", _duration(sum(seconds.values())), f"{max(peak_memory_mb.values()):,.0f}", style="bold")
    return made


def _finding_table(findings: list[Finding]) -> Table:
    rows = []
    for finding in findings:
        text = Text(finding.message).append(f" -> {finding.cure}" if finding.cure else "", style="italic")
        rows.append((Text(finding.level, STYLES[finding.level]), finding.task, text))
    made = table("Findings", ("", "", ""), rows, left=3, show_header=False, **WITHOUT_LINES)
    made.columns[0].no_wrap = made.columns[1].no_wrap = True
    return made


def _range(values: list[int]) -> str:
    return " to ".join(f"{value:,}" for value in sorted({min(values), max(values)})) if values else "-"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
