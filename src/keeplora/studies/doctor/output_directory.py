"""Can the run directory be written, and how much disk space does it have?"""

import shutil
import tempfile
from pathlib import Path

from keeplora.runs.manifest import read_manifest
from keeplora.studies.doctor.findings import Finding


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
        if not output.is_dir() or {path.name for path in output.iterdir()} <= {"run.json.part", "lock"}:
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
