"""`run.json`: what a run is, how far it is, and the hash of every file; and how one is opened by one process alone."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the layout of a run directory; a reader refuses a newer one."""

VERSIONS_OF = ("keeplora", "torch", "transformers", "peft", "accelerate", "safetensors")


def open_manifest(folder: Path, config: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Return the manifest of the run that is there, or a new one."""
    if (folder / "run.json").exists():
        found = read_manifest(folder)
        if found["tasks_finished"] > 0:  # Otherwise nothing is lost by starting over, perhaps with what was mended.
            _require_same(folder, found, config, tasks)
            return found
    return {
        "format": FORMAT,
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
        ValueError: If the folder holds no run, or one of a newer format, or the file is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {path}")
    try:
        manifest = json.loads(path.read_text())
        newer = manifest["format"] > FORMAT
        complete = {"config", "tasks", "tasks_finished", "phase", "files"} <= set(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not of keeplora: {error}") from None
    if newer:
        raise ValueError(f"{path} has format {manifest['format']}, newer than {FORMAT}; update keeplora")
    if not complete:
        raise ValueError(f"{path} is damaged or not of keeplora: a key is missing")
    return dict(manifest)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out; the operating system drops the lock when its owner ends, however it ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}; wait for it, or give another --output") from None
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, on the disk itself, and rename it: a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for every setting that differs, by its dotted name, and a single one for those of the tasks."""
    before, now = _flat(before), _flat(now)
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    phrases = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in different if not key.startswith("tasks.")
    ]
    of_tasks = list(dict.fromkeys(key.split(".")[1] for key in different if key.startswith("tasks.")))
    if of_tasks:
        more = f" and {len(of_tasks) - 1} more" if len(of_tasks) > 1 else ""
        phrases.append(f"the benchmark's table of task {of_tasks[0]!r}{more} was another")
    return phrases


def _require_same(folder: Path, found: dict[str, Any], config: dict[str, Any], tasks: list[str]) -> None:
    different = differences(found["config"], config)
    if found["tasks"] != tasks:
        different.append(f"tasks were {found['tasks']}, are {tasks}")
    if different:
        raise ValueError(f"{folder} holds another run ({'; '.join(different)}); give another --output")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
