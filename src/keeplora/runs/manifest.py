"""`run.json`: what a run is, how far it is, and the hash of every file; and the lock that lets one process write."""

import hashlib
import json
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from pydantic import BaseModel, PositiveInt

from keeplora.config import Count, require
from keeplora.errors import InUseError

logger = logging.getLogger(__name__)

RUN_FORMAT = 3  # Version of the layout of a run directory; a reader refuses any other.
Settings = Mapping[str, tuple[Any, str]]  # Every setting of a run by its dotted name, and where it came from.


class Form(BaseModel, extra="allow", strict=True):
    """What a JSON file of a run must hold: hashes tell one that changed, a form tells one that something else wrote."""


class _Data(Form):
    classes: list[str]
    images: list[int]
    digest: str


class _Manifest(Form):
    format: int
    config: dict[str, Any]
    tasks: list[str]
    tasks_finished: Count
    phase: str
    files: dict[str, str]
    leaving: list[str] = []
    data: dict[str, _Data] = {}
    nearby: dict[str, str] = {}
    processes: PositiveInt = 1
    checksum: str


def new_manifest(config: dict[str, Any], tasks: list[str], settings: Settings | None = None) -> dict[str, Any]:
    """Return the manifest of a run that has not begun, with its settings and the place each of them came from."""
    libraries = ("keeplora", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {
        "format": RUN_FORMAT,
        "versions": {name: version(name) for name in libraries} | {"python": platform.python_version()},
        "config": config,
        "sources": {name: source for name, (_, source) in (settings or {}).items()},
        "tasks": tasks,
        "tasks_finished": 0,
        "phase": "running",
        "files": {},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `run.json`; ValueError says that there is none, it is of another format, or damaged, or was changed."""
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        found = manifest["format"]
        is_unchanged = manifest_bytes({key: manifest[key] for key in manifest if key != "checksum"}) == content
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not of keeplora: {type(error).__name__}: {error}") from None
    if type(found) is int and found != RUN_FORMAT:
        newer = f"newer than {RUN_FORMAT}; update keeplora"
        older = f"older than {RUN_FORMAT}; resume it with the keeplora that wrote it, or run it again"
        raise ValueError(f"{path} has format {found}, {newer if found > RUN_FORMAT else older}")
    checked = require(_Manifest, manifest, str(path))
    if not is_unchanged:
        raise ValueError(f"{path} is not what the run wrote: it was changed or damaged")
    names = [*checked.files, *checked.leaving]
    wrong = [name for name in names if PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    # A question's template may have lines.
    told = [text.translate({9: " ", 10: " "}) for text in _texts([checked.config, checked.tasks])]
    wrong += [ascii(text) for text in told if not text.isprintable()]
    if wrong or checked.tasks_finished > len(checked.tasks):
        raise ValueError(f"{path} is damaged or not of keeplora: {wrong or 'more tasks finished than there are'}")
    del manifest["checksum"]
    return dict(manifest)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in plain values, the keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(inner)


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the content of `run.json`: JSON that ends with its own SHA-256, so that any change of it is noticed."""
    checksum = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return (json.dumps({**manifest, "checksum": checksum}, indent=1) + "\n").encode()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out, by an `InUseError`; the operating system drops the lock when its owner ends."""
    path = folder / "lock"
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; remove it, so that nothing is written to what it leads to")
    lock: BaseFileLock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except NotImplementedError:
            logger.warning("%s: the file system has no locks; a file keeps other processes of this machine out", path)
            lock = SoftFileLock(path, timeout=0)
            lock.acquire()
    except Timeout:
        owner = path.read_text().strip() if path.exists() else ""
        message = f"another process ({owner or 'unknown'}) is writing to {folder}"
        raise InUseError(f"{message}; wait for it, or give another --output") from None
    try:
        if isinstance(lock, FileLock):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)  # While it is ours: who waits for it takes a new one.
        lock.release()
