"""Writes that survive a crash: a file is on the disk itself before it takes its name. Every write of a run is here."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, on the disk itself, and rename it: a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".part")
    write_through(temporary, content)
    rename(temporary, path)


def write_through(path: Path, content: bytes) -> None:
    """Write a file, in a new folder if need be, and wait until it and its name are on the disk itself."""
    make_folder(path.parent)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and wait until they are on the disk itself."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def flush(folder: Path) -> None:
    """Wait until everything in a folder that another library wrote is on the disk itself."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def rename(source: Path, target: Path) -> None:
    """Give a file its name, in the place of the one that has it, and wait until that is on the disk itself."""
    make_folder(target.parent)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """Give a folder to fill, and let it take its name when that is done: it is there as a whole or not at all.

    Raises:
        ValueError: If the output has something in it already, or is a file.
    """
    require_empty(output)
    output = output.resolve()
    make_folder(output.parent)
    part = output.with_name(f".{output.name}.part")
    remove(part)  # Left by a process that was killed.
    try:
        yield part
        rename(part, output)
    finally:
        remove(part)


def require_no_links(folder: Path) -> None:
    """Check that nothing in a folder is a symbolic link: what is written there must stay there.

    Raises:
        ValueError: If something is.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link; a run directory has none: put what it points to there")


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
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
