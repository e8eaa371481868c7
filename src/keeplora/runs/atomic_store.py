"""A folder whose files change together or not at all, listed with their SHA-256 in its manifest.

New files wait in `staged/` until `run.json`, with their hashes and the names of those that leave, takes its place: that
is the commit. A crash before it drops them, one after it is made up for by `recover`. Only the first process writes.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from keeplora.layers.distributed import is_main_process
from keeplora.runs.manifest import manifest_bytes

STAGED = "staged"

CURE = (
    ". Put it back from a copy; keeplora certify lists all that is damaged, and keeplora export --format merged makes"
    " the model again from the adapters"
)
"""What one can do about a file that is not as it was."""


class Store:
    """Reads and writes the files that a manifest lists; `files` are those of the last commit, with their SHA-256."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.files: dict[str, str] = manifest["files"]
        self._next = dict(self.files)

    def write(self, name: str, content: bytes) -> None:
        """Hand in a file for the next commit."""
        if is_main_process():
            write_through(self.folder / STAGED / name, content)
            self._next[name] = hashlib.sha256(content).hexdigest()

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Hand in a safetensors file for the next commit; the tensors are written from where they are."""
        if is_main_process():
            place = self.folder / STAGED / name
            make_folder(place.parent)
            save_file({key: value.contiguous() for key, value in tensors.items()}, place, metadata)
            give_usual_modes(place)
            flush(place)
            self._next[name] = sha256_of(place)

    def write_folder(self, name: str, save: Callable[[Path], None]) -> None:
        """Hand in a folder, to which `save` writes its files, for the next commit, in the place of the one there."""
        self.remove(f"{name}/")
        if is_main_process():
            place = self.folder / STAGED / name
            remove(place)  # What was handed in before under this name would be taken for a part of it.
            save(place)
            give_usual_modes(place)
            flush(place)
            for path in (path for path in sorted(place.rglob("*")) if path.is_file()):
                self._next[f"{name}/{path.relative_to(place).as_posix()}"] = sha256_of(path)

    def remove(self, prefix: str) -> None:
        """Hand in for the next commit that the files whose path begins so are to go."""
        self._next = {name: digest for name, digest in self._next.items() if not name.startswith(prefix)}

    def commit(self) -> None:
        """Let the manifest as it is now, and all that was handed in, take effect at once."""
        before, self.files = self.files, dict(self._next)
        self.manifest["files"] = self.files
        self.manifest.pop("leaving", None)
        if leaving := sorted(before.keys() - self._next.keys()):
            self.manifest["leaving"] = leaving
        if is_main_process():
            write_through(self.folder / "run.json.part", manifest_bytes(self.manifest))
            rename(self.folder / "run.json.part", self.folder / "run.json")
            self._settle(name for name, digest in self._next.items() if digest != before.get(name))

    def recover(self) -> None:
        """Finish, or drop, what a crash left half done."""
        if is_main_process():
            staged = self.folder / STAGED
            names = [path.relative_to(staged).as_posix() for path in sorted(staged.rglob("*")) if path.is_file()]
            self._settle(name for name in names if sha256_of(staged / name) == self.files.get(name))
            remove(self.folder / "run.json.part")

    def _settle(self, arriving: Iterable[str]) -> None:
        """Give new files of the last commit their names, and remove those that leave, and whatever else is staged."""
        for name in arriving:
            rename(self.folder / STAGED / name, self.folder / name)
        for name in self.manifest.get("leaving", []):
            if name not in self.files and (self.folder / name).is_file():
                remove(self.folder / name)
        remove(self.folder / STAGED)

    def read(self, name: str) -> bytes:
        """Read a file and check its hash; ValueError names it if it is missing or damaged."""
        for place in self._places_of(name):
            if hashlib.sha256(content := place.read_bytes()).hexdigest() == self.files.get(name):
                return content
        raise ValueError("".join(self.damaged([name])) + CURE)

    def damaged(self, names: Iterable[str] | None = None) -> list[str]:
        """Return a message for each of these files, or of all, that is missing or damaged; it names the file."""
        flaws = []
        for name in self.files if names is None else names:
            digests = [sha256_of(place) for place in self._places_of(name)]
            if not digests:
                flaws.append(f"{self.folder / name} is missing from the run")
            elif self.files.get(name) not in digests:
                flaws.append(f"{self.folder / name} is not what the run wrote: it was changed or damaged")
        return flaws

    def strangers(self) -> list[Path]:
        """Return what lies among the files of tasks and of the model, and is none that the manifest lists."""
        # Those that leave are still there while a commit settles.
        listed = {self.folder / name for name in (*self.files, *self.manifest.get("leaving", []))}
        above = {folder for path in listed for folder in path.parents}
        there = (path for part in ("tasks", "model") for path in sorted((self.folder / part).rglob("*")))
        found = [path for path in there if path not in (above if path.is_dir() else listed)]
        return [path for path in found if path.parent not in found]

    def _places_of(self, name: str) -> list[Path]:
        """Return where a file may be: in a commit that is under way, it may not have its name yet."""
        return [place for place in (self.folder / STAGED / name, self.folder / name) if place.is_file()]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a name of its own, on the disk itself, and rename it: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        write_through(temporary, content)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: object) -> None:
    """Write a JSON file in the same way."""
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def write_through(path: Path, content: bytes) -> None:
    """Write a file, in a new folder if need be, and wait until it and its name are on the disk itself."""
    make_folder(path.parent)
    path.unlink(missing_ok=True)  # A link that waits there would lead elsewhere.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(content)
    flush(path)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and wait until they are on the disk itself."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def flush(place: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk itself."""
    for path in (*sorted(place.rglob("*")), place, place.parent):
        _sync(path)


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
    """Give a folder to fill, and let it take its name when that is done: it is there as a whole or not at all."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give another --output")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output, or empty it")
    output = output.resolve()
    if runs := [folder for folder in output.parents if (folder / "run.json").is_file()]:
        raise ValueError(f"{output} is inside the run directory {runs[0]}; give another --output")
    make_folder(output.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        yield part
        give_usual_modes(part)
        flush(part)
        rename(part, output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ValueError(f"another process has written {output} meanwhile; give another --output") from None
    finally:
        remove(part)


def give_usual_modes(place: Path) -> None:
    """Let a file, or a folder with all that is in it, be read by whom other new files can be read by."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (place, *place.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def require_no_links(folder: Path) -> None:
    """Raise ValueError if something in a folder is a symbolic link: what is written there must stay there."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link; a run directory has none: put what it points to there")


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
