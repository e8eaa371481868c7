"""Can the run directory be written, and is there room for it?"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from keeplora.runs.manifest import read_manifest
from keeplora.studies.doctor.findings import Finding


@dataclass(frozen=True)
class Disk:
    """What a run needs on disk at most, by what it is for, and what there is."""

    needs: dict[str, int]
    free: int
    place: Path

    @property
    def total(self) -> int:
        """The bytes that the run needs at most."""
        return sum(self.needs.values())


def place_findings(output: Path) -> list[Finding]:
    """Say what keeps a run from writing to its directory; nothing is left behind."""
    if output.exists() and not output.is_dir():
        return [Finding("problem", "", f"{output} is a file", "give another --output")]
    folder = nearest_folder(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [Finding("problem", "", f"{folder} cannot be written: {error.strerror}", "give another --output")]
    return _occupied_findings(output) if output.is_dir() else []


def _occupied_findings(output: Path) -> list[Finding]:
    if not (output / "run.json").exists():
        ours = {"run.json.part", "lock"}
        if {path.name for path in output.iterdir()} - ours:
            message = f"{output} is not empty and holds no run"
            return [Finding("problem", "", message, "give another --output, or empty it")]
        return []
    try:
        manifest = read_manifest(output)
    except ValueError as error:
        return [Finding("problem", "", str(error), "give another --output")]
    finished, tasks = manifest["tasks_finished"], len(manifest["tasks"])
    message = f"{output} holds a run already, with {finished} of {tasks} tasks finished"
    cure = "the same command goes on with it; a run with other settings needs another --output"
    return [Finding("note", "", message, cure)]


def disk_of(needs: dict[str, int], output: Path) -> Disk:
    """Compare what a run needs with the free space of the file system of its directory."""
    folder = nearest_folder(output)
    return Disk(needs, shutil.disk_usage(folder).free, folder)


def disk_findings(disk: Disk) -> list[Finding]:
    """Say so if the run does not fit."""
    if disk.total <= disk.free:
        return []
    message = f"the run needs up to {disk.total / 1e6:,.0f} MB and {disk.place} has {disk.free / 1e6:,.0f} MB free"
    return [Finding("problem", "", message, "make room, give another --output, or set --no-save-model")]


def nearest_folder(output: Path) -> Path:
    """Return the folder of a run directory, or the nearest one above it that exists."""
    folder = output.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder
