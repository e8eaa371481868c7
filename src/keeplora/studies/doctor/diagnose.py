"""A check before hours are spent: data, prompts, model, room, time, memory and disk of a run, without starting it.

It goes on after what it finds, so that one call names all that is wrong. Nothing is left behind.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from keeplora.data.cache import MEMORY_LIMIT, kept
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.runs.config import RunConfig
from keeplora.studies.doctor.data import TaskData, read_task, scan_task, task_findings
from keeplora.studies.doctor.dry_run import BATCHES, FAILURES, Rehearsal, rehearse
from keeplora.studies.doctor.duplicates import duplicate_findings
from keeplora.studies.doctor.findings import Finding, merged, without_task
from keeplora.studies.doctor.model import Subject, load_subject, target_findings
from keeplora.studies.doctor.output_directory import Disk, disk_findings, disk_of, place_findings
from keeplora.studies.doctor.prompts import prompt_findings
from keeplora.studies.doctor.resource_estimate import Forecast, Load, Stored, forecast_disk, forecast_time

READING_SECONDS = 60.0
"""No further task is read for the rehearsal once reading took this long; the smallest tasks come first."""


@dataclass
class Diagnosis:
    """What was found about a run that could be started."""

    config: RunConfig
    tasks: list[TaskData] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    subject: Subject | None = None
    tried: int = 0
    """On how many tasks the times rest."""
    forecast: Forecast | None = None
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    pixels_mb: float = 0.0
    """What the images take in memory once they are read."""
    disk: Disk | None = None

    def num(self, level: str) -> int:
        """Return how many findings of a level there are."""
        return sum(finding.level == level for finding in self.findings)

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 1 if there is a problem, or, if `strict`, a warning; otherwise 0."""
        return int(self.num("problem") > 0 or (strict and self.num("warning") > 0))


def diagnose(config: RunConfig, *, duplicates: bool = True, track: Track = silent) -> Diagnosis:
    """Examine a run: what would stop it, what would spoil it, what it would take.

    Args:
        config: The run.
        duplicates: Decode every image and look for the same ones in two places; without it only headers are read.
        track: Shows progress.

    Raises:
        ValueError: If the benchmark's file is wrong; all else is a finding.
    """
    found = Diagnosis(config)
    specs = config.stream
    found.subject, of_model = load_subject(config.model)
    if found.subject is not None:
        method = find_method(config.method)[0](config.options, seed=config.seed, track=silent)
        of_model += target_findings(found.subject, method)
    found.findings += place_findings(config.output) + of_model
    for spec in specs:
        data, findings = read_task(spec, config.evaluation)
        scan_task(data, track, decode=duplicates)
        found.tasks.append(data)
        found.findings += findings + task_findings(data, found.subject.side if found.subject else None)
    found.findings += duplicate_findings(found.tasks, config.evaluation, track)
    if found.subject is not None:
        of_prompts = prompt_findings(found.subject.source, found.subject.context, found.tasks)
        found.findings += of_prompts
        is_sound = not any(one.level == "problem" and not one.task for one in of_model + of_prompts)
        rehearsal = _try_out(found, found.subject, track) if is_sound else Rehearsal()
        _weigh_disk(found, found.subject, rehearsal)
    found.findings = merged(found.findings)
    return found


def _try_out(found: Diagnosis, subject: Subject, track: Track) -> Rehearsal:
    """Rehearse the tasks that nothing is wrong with, and extrapolate to all."""
    stopped = {finding.task for finding in found.findings if finding.level == "problem"}
    usable = [data for data in found.tasks if data.is_usable and data.name not in stopped]
    tasks, per_image = _read_some(found, subject, usable, track)
    if not tasks:
        return Rehearsal()
    rehearsal = rehearse(subject.model, tasks, list(subject.shapes), found.config, track)
    found.findings += rehearsal.findings
    if rehearsal.paces:
        found.tried = len(rehearsal.paces)
        found.peak_memory_mb = rehearsal.peak_memory_mb
        found.forecast = _forecast(found, subject, rehearsal, per_image)
        _weigh_pixels(found, tasks)
    return rehearsal


def _read_some(
    found: Diagnosis, subject: Subject, usable: list[TaskData], track: Track
) -> tuple[list[StreamTask], float]:
    """Read tasks as a run does, smallest first, until the time is spent.

    Returns:
        The tasks, from the fewest classes to the most, and the seconds that an image took.
    """
    config, read = found.config, {}
    start, images = time.perf_counter(), 0
    with kept():
        for data in sorted(usable, key=_num_images):
            try:
                (read[data.name],) = subject.family.tasks(
                    subject.source, (data.spec,), batch_size=config.train.batch_size, evaluation=config.evaluation,
                    seed=config.seed, track=track,
                )  # fmt: skip
            except FAILURES as error:
                message = f"the task cannot be made ready for the model: {without_task(error, data.name)}"
                found.findings.append(Finding("problem", data.name, message))
                continue
            images += _num_images(data)
            if time.perf_counter() - start > READING_SECONDS:
                break
    seconds = (time.perf_counter() - start) / max(1, images)
    usable = sorted(usable, key=lambda data: len(data.class_names))
    return [read[data.name] for data in usable if data.name in read], seconds


def _forecast(found: Diagnosis, subject: Subject, rehearsal: Rehearsal, per_image: float) -> Forecast:
    train, loads = found.config.train, []
    for data in found.tasks:
        if set(data.splits) < {"train", found.config.evaluation}:
            continue
        num_train, num_held = (len(data.splits[split]) for split in ("train", found.config.evaluation))
        batches = rehearsal.batches.get(data.name, math.ceil(num_train / train.batch_size))
        held = math.ceil(num_held / train.batch_size)
        epochs = data.spec.epochs or train.epochs
        loads.append(Load(data.name, len(data.class_names), num_train + num_held, batches, held, epochs))
    return forecast_time(
        loads,
        rehearsal.paces,
        start=subject.phases.get("start", {}).get("seconds", 0.0),
        per_image=per_image,
        gradient_share=getattr(found.config.options, "gradient_share", 1.0),
        evaluations=None if rehearsal.changes_model else 1,
    )


def _weigh_pixels(found: Diagnosis, tasks: list[StreamTask]) -> None:
    """Say how much memory the images take, and whether that of the machine is enough for all."""
    batch = next(iter(tasks[0].batches()))
    if not isinstance(batch, Mapping) or "pixel_values" not in batch:
        return
    read = {task.name for task in tasks}
    size = batch["pixel_values"][0].numel()  # A byte each.
    everything = min(MEMORY_LIMIT, size * sum(map(_num_images, found.tasks)))
    here = min(MEMORY_LIMIT, size * sum(_num_images(data) for data in found.tasks if data.name in read))
    found.pixels_mb = everything / 2**20
    if torch.cuda.is_available():
        return
    for phase in found.peak_memory_mb:
        found.peak_memory_mb[phase] += (everything - here) / 2**20
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    if (needs := max(found.peak_memory_mb.values())) > has:
        message = f"a run needs about {needs:,.0f} MiB of memory, and this machine has {has:,.0f}"
        found.findings.append(Finding("warning", "", message, "lower batch_size"))


def _weigh_disk(found: Diagnosis, subject: Subject, rehearsal: Rehearsal) -> None:
    """Say how much the run writes, and whether there is room for it."""
    config = found.config
    needs = forecast_disk(
        Stored(
            shapes=subject.shapes,
            rank=config.options.rank,
            num_tasks=len(found.tasks),
            model_bytes=subject.weight_bytes,
            saves_model=config.save_model,
            free=subject.free,
            extra_bytes=rehearsal.extra_bytes,
        )
    )
    found.disk = disk_of({name: size for name, size in needs.items() if size}, config.output)
    found.findings += disk_findings(found.disk)


def _num_images(data: TaskData) -> int:
    return sum(len(examples) for examples in data.splits.values())


__all__ = ["BATCHES", "Diagnosis", "Finding", "diagnose"]
