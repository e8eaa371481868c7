"""A check of a run without starting it, that names all that is wrong: data, model, capacity, time, memory, disk."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from keeplora.data.cache import MEMORY_LIMIT, kept
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.runs.config import RunConfig
from keeplora.runs.manifest import read_manifest
from keeplora.runs.open import LEFT_BY_A_START
from keeplora.studies.doctor.data import TaskData, examine_data
from keeplora.studies.doctor.dry_run import DryRun
from keeplora.studies.doctor.duplicates import duplicate_findings
from keeplora.studies.doctor.findings import FAILURES, Finding, merged
from keeplora.studies.doctor.model import Subject, load_subject, prompt_findings
from keeplora.studies.doctor.resource_estimate import Load, estimate_disk, estimate_seconds

READING_SECONDS = 60.0  # No further task is read for the dry run once reading took so long; the smallest come first.


class Disk:
    """What a run needs on disk at most, by what it is for, and how many bytes are free where it would write."""

    def __init__(self, needs: dict[str, int], output: Path) -> None:
        self.needs, self.total = needs, sum(needs.values())
        self.folder = nearest_folder(output)
        self.free = shutil.disk_usage(self.folder).free


def output_findings(output: Path) -> list[Finding]:
    """Say what keeps a run from writing to its directory, or that there is one; nothing is left behind."""
    folder, cure = nearest_folder(output), "give another --output"
    if output.exists() and not output.is_dir():
        return [Finding("problem", "", f"{output} is a file", cure)]
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [Finding("problem", "", f"{folder} cannot be written: {error.strerror}", cure)]
    if not (output / "run.json").exists():
        if not output.is_dir() or {path.name for path in output.iterdir()} <= LEFT_BY_A_START:
            return []
        return [Finding("problem", "", f"{output} is not empty and holds no run", f"{cure}, or empty it")]
    try:
        manifest = read_manifest(output)
    except ValueError as error:
        return [Finding("problem", "", str(error), cure)]
    finished = f"{manifest['tasks_finished']} of {len(manifest['tasks'])} tasks finished"
    cure = "the same command resumes it; a run with other settings needs another --output"
    return [Finding("note", "", f"{output} holds a run already, with {finished}", cure)]


def nearest_folder(output: Path) -> Path:
    """Return the folder of a run directory, or the nearest one above it that exists."""
    return next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())


@dataclass
class Diagnosis:
    """What was found about a run that could be started."""

    config: RunConfig
    tasks: list[TaskData]
    findings: list[Finding] = field(default_factory=list)
    subject: Subject | None = None
    dry_run: DryRun = field(default_factory=DryRun)
    estimate: dict[str, float] = field(default_factory=dict)  # The seconds of each phase; empty if no task was tried.
    pixels_mb: float = 0.0  # What the images take in memory once they are read.
    disk: Disk | None = None

    def num(self, level: str) -> int:
        """Return how many findings of a level there are."""
        return sum(finding.level == level for finding in self.findings)

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 1 if there is a problem, or, if `strict`, a warning; otherwise 0."""
        return int(self.num("problem") > 0 or (strict and self.num("warning") > 0))


def diagnose(config: RunConfig, *, duplicates: bool = True, track: Track = silent) -> Diagnosis:
    """Examine a run: what would stop it, what would spoil it, what it would take.

    Without `duplicates` only the headers of images are read, and none is looked for in two places.

    Raises:
        ValueError: If the benchmark's file is wrong; all else is a finding.
    """
    found = Diagnosis(config, [TaskData(spec) for spec in config.stream])
    subject = found.subject = load_subject(config, found.findings)
    side = subject.side if subject else 0
    for data in found.tasks:
        found.findings += examine_data(data, config.evaluation, side, track, decode=duplicates)
    found.findings += duplicate_findings(found.tasks, config.evaluation, track)
    if subject is not None:
        found.findings += prompt_findings(subject, found.tasks)
        if not any(finding.level == "problem" and not finding.task for finding in found.findings):
            _try_out(found, subject, track)
        _weigh_disk(found, subject)
    found.findings = merged([*output_findings(config.output), *found.findings])
    return found


def _try_out(found: Diagnosis, subject: Subject, track: Track) -> None:
    """Make a dry run of the tasks that nothing is wrong with, and extrapolate to all."""
    config, dry_run, loads = found.config, found.dry_run, []
    tasks, per_image = _read_some(found, subject, track)
    if tasks:
        dry_run.run(subject.model, tasks, list(subject.shapes), config, track)
        found.findings += dry_run.findings
    if not dry_run.paces:
        return
    for data in found.tasks:
        if len(data.sizes) == 2:
            size, name = config.train.batch_size, data.spec.name
            train, held_out = (math.ceil(data.sizes[split] / size) for split in ("train", config.evaluation))
            batches, epochs = dry_run.batches.get(name, train), data.spec.epochs or config.train.epochs
            loads.append(Load(name, len(data.class_names), data.num_images, batches, held_out, epochs))
    start, share = subject.start_seconds, getattr(config.options, "gradient_share", 1.0)
    rounds = None if dry_run.changes_model else 1  # A model that never changes is evaluated once.
    found.estimate = estimate_seconds(
        loads, dry_run.paces, start=start, per_image=per_image, gradient_share=share, evaluations=rounds
    )
    _weigh_memory(found, tasks)


def _read_some(found: Diagnosis, subject: Subject, track: Track) -> tuple[list[StreamTask], float]:
    """Read tasks as a run does, smallest first, until time is spent; return them by classes, and seconds an image."""
    config, images = found.config, 0
    read: list[tuple[int, StreamTask]] = []
    stopped = {finding.task for finding in found.findings if finding.level == "problem"}
    usable = [data for data in found.tasks if data.spec.name not in stopped]
    start = time.perf_counter()
    with kept():
        for data in sorted(usable, key=lambda data: data.num_images):
            if read and time.perf_counter() - start > READING_SECONDS:
                break
            try:
                (task,) = subject.family.tasks(
                    subject.source, (data.spec,), batch_size=config.train.batch_size, evaluation=config.evaluation,
                    seed=config.seed, track=track,
                )  # fmt: skip
            except FAILURES as error:
                message = f"the task cannot be made ready for the model: {error}"
                found.findings.append(Finding("problem", data.spec.name, message))
                continue
            read.append((len(data.class_names), task))
            data.prompts = task.shown() or data.prompts
            found.findings += [Finding("note", data.spec.name, text) for text in task.remarks()]
            images += data.num_images
    per_image = (time.perf_counter() - start) / max(1, images)
    return [task for _, task in sorted(read, key=lambda one: one[0])], per_image


def _weigh_memory(found: Diagnosis, tasks: list[StreamTask]) -> None:
    """Say how much memory the images take, and whether that of the machine is enough for all."""
    batch = next(iter(tasks[0].batches()))
    if not isinstance(batch, Mapping) or "pixel_values" not in batch:
        return
    read = {task.name for task in tasks}
    size = batch["pixel_values"][0].numel()  # A byte each.
    everything = min(MEMORY_LIMIT, size * sum(data.num_images for data in found.tasks))
    here = min(MEMORY_LIMIT, size * sum(data.num_images for data in found.tasks if data.spec.name in read))
    found.pixels_mb = everything / 2**20
    if torch.cuda.is_available():
        return
    peaks = found.dry_run.peak_memory_mb
    peaks |= {phase: peak + (everything - here) / 2**20 for phase, peak in peaks.items()}
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    if (needs := max(peaks.values())) > has:
        message = f"a run needs about {needs:,.0f} MiB of memory, and this machine has {has:,.0f}"
        found.findings.append(Finding("warning", "", message, "lower batch_size"))


def _weigh_disk(found: Diagnosis, subject: Subject) -> None:
    """Say how much the run writes, and whether there is space for it."""
    rank, other = found.config.options.rank, found.dry_run.extra_bytes
    size = subject.weight_bytes if found.config.save_model and not found.config.keeps_beside else 0
    needs = estimate_disk(
        subject.shapes, subject.free, rank=rank, num_tasks=len(found.tasks), model_bytes=size, other=other
    )
    found.disk = disk = Disk(needs, found.config.output)
    if disk.total > disk.free:
        message = f"the run needs up to {disk.total / 1e6:,.0f} MB and {disk.folder} has {disk.free / 1e6:,.0f} MB free"
        cure = "free some space, give another --output, or set --no-save-model"
        found.findings.append(Finding("problem", "", message, cure))
