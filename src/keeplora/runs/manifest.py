"""`run.json`: what a run is, how far it is, and the hash of every file; and how one is opened by one process alone."""

import fcntl
import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from keeplora.errors import InUseError

RUN_FORMAT = 2
"""Version of the layout of a run directory; a reader refuses any other."""

VERSIONS_OF = ("keeplora", "torch", "transformers", "peft", "accelerate", "safetensors")

Count = Annotated[int, Field(ge=0)]


class _Required(BaseModel, extra="allow", strict=True):
    """The keys that every manifest has; more may stand beside them."""

    format: int
    config: dict[str, Any]
    tasks: list[str]
    tasks_finished: Count
    phase: str
    files: dict[str, str]
    leaving: list[str] = []


def new_manifest(config: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Return the manifest of a run that has not begun."""
    return {
        "format": RUN_FORMAT,
        "versions": {name: version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "config": config,
        "tasks": tasks,
        "tasks_finished": 0,
        "phase": "running",
        "files": {},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        ValueError: If the folder holds no run, or one of another format, or the file is damaged or was changed.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        found = manifest["format"]
        is_other = type(found) is int and found != RUN_FORMAT
        if not is_other:
            del manifest["checksum"]
            _Required.model_validate(manifest)
            is_unchanged = manifest_bytes(manifest) == content
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not of keeplora: {_first_line(error)}") from None
    if is_other:
        raise ValueError(_other_format(path, found))
    if not is_unchanged:
        raise ValueError(f"{path} is not what the run wrote: it was changed or damaged")
    names = [*manifest["files"], *manifest.get("leaving", [])]
    wrong = [name for name in names if PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    if wrong or manifest["tasks_finished"] > len(manifest["tasks"]):
        raise ValueError(f"{path} is damaged or not of keeplora: {wrong or 'more tasks finished than there are'}")
    return dict(manifest)


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the content of `run.json`: JSON that ends with its own SHA-256, so that any change of it is noticed."""
    checksum = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return (json.dumps({**manifest, "checksum": checksum}, indent=1) + "\n").encode()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out; the operating system drops the lock when its owner ends, however it ends.

    Raises:
        InUseError: If another process has the lock.
    """
    path = folder / "lock"
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise InUseError(
                    f"another process ({owner}) is writing to {folder}; wait for it, or give another --output"
                ) from None
            if not _is_at(path, file.fileno()):
                continue  # The owner before us removed it after we had opened it.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, number: int) -> bool:
    """Tell whether an open file is still the one of that name."""
    try:
        return path.stat().st_ino == os.fstat(number).st_ino
    except FileNotFoundError:
        return False


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for every setting that differs, by its dotted name, and a single one for those of the tasks."""
    old, new = _flat(before), _flat(now)
    different = [
        path for path in sorted({*old, *new}) if old.get(path) != new.get(path) or (path in old) != (path in new)
    ]
    above = {path[:length] for path in different for length in range(len(path))}
    different = [  # A table that is empty on one side is named by what the other has in it.
        path for path in different if path not in above or {} not in (old.get(path), new.get(path))
    ]
    of_tasks = list(dict.fromkeys(path[1] for path in different if path[0] == "tasks" and len(path) > 1))
    phrases = [
        f"{'.'.join(path)} was {_shown(old, path)}, is {_shown(new, path)}"
        for path in different
        if path[0] != "tasks" or len(path) == 1
    ]
    if of_tasks:
        more = f" and {len(of_tasks) - 1} more" if len(of_tasks) > 1 else ""
        phrases.append(f"the benchmark's table of task {of_tasks[0]!r}{more} was another")
    return phrases


def _other_format(path: Path, found: int) -> str:
    if found > RUN_FORMAT:
        return f"{path} has format {found}, newer than {RUN_FORMAT}; update keeplora"
    return f"{path} has format {found}, older than {RUN_FORMAT}; go on with the keeplora that wrote it, or run it again"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _flat(config: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return nested settings by their path; an empty table is a value too."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in config.items():
        path = (*above, key)
        flat |= _flat(value, path) if isinstance(value, dict) and value else {path: value}
    return flat


def _shown(flat: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> str:
    return repr(flat[path]) if path in flat else "missing"
