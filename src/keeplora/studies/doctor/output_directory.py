"""Can the run directory be written, and how much disk space does it have?"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keeplora.runs.manifest import read_manifest
from keeplora.studies.doctor.findings import Finding

OTHER = "give another --output"


class Disk:
    """What a run needs on disk at most, by what it is for, and how many bytes are free where it would write."""

    def __init__(self, needs: dict[str, int], output: Path) -> None:
        self.needs = needs
        self.total = sum(needs.values())
        self.folder = nearest_folder(output)
        self.free = shutil.disk_usage(self.folder).free


def output_findings(output: Path) -> Iterator[Finding]:
    """Say what keeps a run from writing to its directory; nothing is left behind."""
    if output.exists() and not output.is_dir():
        yield Finding("problem", "", f"{output} is a file", OTHER)
        return
    folder = nearest_folder(output)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding("problem", "", f"{folder} cannot be written: {error.strerror}", OTHER)
        return
    if (output / "run.json").exists():
        yield _run_that_is_there(output)
    elif output.is_dir() and {path.name for path in output.iterdir()} - {"run.json.part", "lock"}:
        yield Finding("problem", "", f"{output} is not empty and holds no run", f"{OTHER}, or empty it")


def _run_that_is_there(output: Path) -> Finding:
    try:
        manifest = read_manifest(output)
    except ValueError as error:
        return Finding("problem", "", str(error), OTHER)
    finished, tasks = manifest["tasks_finished"], len(manifest["tasks"])
    message = f"{output} holds a run already, with {finished} of {tasks} tasks finished"
    cure = "the same command resumes it; a run with other settings needs another --output"
    return Finding("note", "", message, cure)


def nearest_folder(output: Path) -> Path:
    """Return the folder of a run directory, or the nearest one above it that exists."""
    return next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.is_dir())
