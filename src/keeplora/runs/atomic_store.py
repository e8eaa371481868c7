"""A folder whose files change together or not at all, listed with their SHA-256 in its manifest.

New files wait in `staged/`. The commit is the moment at which `run.json`, with their hashes and the names of the files
that leave, takes its place; only then do they take their names, and those that leave are removed. After a crash before
that moment they are dropped, after a crash behind it they are moved, and what was to leave is removed.
In several processes, the first one alone touches the disk.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from keeplora.layers.distributed import is_main_process
from keeplora.progress import Track, silent
from keeplora.runs.manifest import manifest_bytes

STAGED = "staged"

CURE = (
    ". Put it back from a copy; keeplora certify lists all that is damaged, and keeplora export --format merged makes"
    " the model again from the adapters"
)
"""What one can do about a file that is not as it was."""


class Store:
    """Reads and writes the files that a manifest lists."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._waiting: dict[str, str] = {}
        self._leaving: set[str] = set()

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of every file by its path below the folder, after the last commit."""
        files: dict[str, str] = self.manifest["files"]
        return files

    def write(self, name: str, content: bytes) -> None:
        """Hand in a file for the next commit."""
        if is_main_process():
            write_through(self.folder / STAGED / name, content)
        self._waiting[name] = sha256(content)
        self._leaving.discard(name)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Hand in a safetensors file for the next commit; the tensors are written from where they are."""
        if is_main_process():
            save_tensors(self.folder / STAGED / name, tensors, metadata)
            self._waiting[name] = sha256_of(self.folder / STAGED / name)
        self._leaving.discard(name)

    def write_folder(self, name: str, save: Callable[[Path], None]) -> None:
        """Hand in a folder for the next commit, in the place of the one of that name.

        Args:
            name: The folder.
            save: Writes its files to the folder that it is given.
        """
        self.remove(f"{name}/")
        if not is_main_process():
            return
        place = self.folder / STAGED / name
        remove(place)  # What was handed in before under this name would be taken for a part of it.
        save(place)
        flush(place)
        for path in sorted(place.rglob("*")):
            if path.is_file():
                file = f"{name}/{path.relative_to(place).as_posix()}"
                self._waiting[file] = sha256_of(path)
                self._leaving.discard(file)

    def remove(self, prefix: str) -> None:
        """Hand in for the next commit that the files whose path begins so are to go."""
        self._leaving |= {name for name in self.files if name.startswith(prefix)}
        self._waiting = {name: digest for name, digest in self._waiting.items() if not name.startswith(prefix)}

    def commit(self) -> None:
        """Let the manifest as it is now, and all that was handed in, take effect at once."""
        kept = {name: digest for name, digest in self.files.items() if name not in self._leaving}
        self.manifest["files"] = kept | self._waiting
        leaving = sorted(self._leaving - set(self._waiting))
        self.manifest.pop("leaving", None)
        if leaving:
            self.manifest["leaving"] = leaving
        if is_main_process():
            write_atomically(self.folder / "run.json", manifest_bytes(self.manifest))
            for name in self._waiting:
                rename(self.folder / STAGED / name, self.folder / name)
            for name in leaving:
                remove(self.folder / name)
            remove(self.folder / STAGED)
        self._waiting, self._leaving = {}, set()

    def recover(self, unfinished: str) -> None:
        """Finish, or drop, what a crash left half done.

        Args:
            unfinished: A folder whose files, where the manifest does not list them, are leftovers too.
        """
        if not is_main_process():
            return
        staged = self.folder / STAGED
        for path in sorted(staged.rglob("*")):
            name = path.relative_to(staged).as_posix()
            if path.is_file() and self.files.get(name) == sha256_of(path):
                rename(path, self.folder / name)
        for name in self.manifest.get("leaving", []):
            if name not in self.files and (self.folder / name).is_file():
                remove(self.folder / name)
        remove(self.folder / "run.json.part")
        remove(staged)
        for path in sorted((self.folder / unfinished).glob("*")):
            if f"{unfinished}/{path.name}" not in self.files:
                remove(path)

    def read(self, name: str) -> bytes:
        """Read a file and check its hash.

        Raises:
            ValueError: If it is missing or damaged; the message names it.
        """
        place = self._place_of(name)
        if place.is_file() and sha256(content := place.read_bytes()) == self.files.get(name):
            return content
        raise ValueError(self._flaw(name) + CURE)

    def check(self, name: str) -> None:
        """Compare a file with its hash, without taking it into memory.

        Raises:
            ValueError: If it is missing or damaged; the message names it.
        """
        if flaw := self._flaw(name):
            raise ValueError(flaw + CURE)

    def damaged(self, track: Track = silent) -> list[str]:
        """Return a message for every file that is missing or damaged; each names its file."""
        flaws = (self._flaw(name) for name in track(self.files, "checking hashes", len(self.files)))
        return [flaw for flaw in flaws if flaw]

    def _flaw(self, name: str) -> str:
        """Say what is wrong with a file; nothing if it is as it should be."""
        place = self._place_of(name)
        if not place.is_file():
            return f"{self.folder / name} is missing from the run"
        if sha256_of(place) != self.files.get(name):
            return f"{self.folder / name} is not what the run wrote: it was changed or damaged"
        return ""

    def _place_of(self, name: str) -> Path:
        """Return where a file is: in a commit that is under way, it may not have its name yet."""
        staged = self.folder / STAGED / name
        return staged if staged.is_file() and sha256_of(staged) == self.files.get(name) else self.folder / name


def sha256(content: bytes) -> str:
    """Return the SHA-256 of some bytes in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file as `write_through` writes a file."""
    make_folder(path.parent)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    _sync(path)
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
