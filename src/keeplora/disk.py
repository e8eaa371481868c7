"""Writes that survive a crash: a file is on the disk itself before it takes its name. Every write of a run is here."""

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, on the disk itself, and rename it: a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".part")
    write_through(temporary, content)
    rename(temporary, path)


def write_through(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk itself; its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until a file that another library wrote is on the disk itself."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give a file its name, in the place of the one that has it, and wait until that is on the disk itself."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_empty(folder: Path) -> None:
    """Check that a folder is not there, or has nothing in it.

    Raises:
        ValueError: If it has, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --output")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another --output, or empty it")


def remove(path: Path) -> None:
    """Remove a folder with all that is in it; or a file, if it is there, and its folder if nothing else is in that."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
