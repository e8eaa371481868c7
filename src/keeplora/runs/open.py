"""How a run directory is opened: put in order after a crash, checked, by one process, and only for its own run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from keeplora.errors import InUseError
from keeplora.runs.atomic_store import STAGED, Store, is_main_process
from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.runs.disk import require_no_links
from keeplora.runs.manifest import differences, locked, new_manifest, read_manifest


@contextmanager
def open_run(folder: Path, config: dict[str, Any], tasks: list[str], *, extend: bool = False) -> Iterator[RunDirectory]:
    """Open a run directory for writing: a new one, or one of the same configuration to go on with.

    Args:
        folder: The run directory.
        config: What is to be run, as plain values.
        tasks: The names of the tasks.
        extend: Whether a finished run may go on with more tasks than it had.

    Raises:
        ValueError: If the folder belongs to another run or is no run or is damaged, or another process is writing to
            it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --output")
    ours = {"run.json", "run.json.part", "lock", STAGED}
    if folder.exists() and not (folder / "run.json").exists() and {path.name for path in folder.iterdir()} - ours:
        raise ValueError(f"{folder} is not empty and holds no run; give another --output, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    require_no_links(folder)
    with locked(folder) if is_main_process() else nullcontext():
        manifest = _manifest(folder, config, tasks, extend)
        Store(folder, manifest).recover(UNFINISHED)
        if dist.is_initialized():
            dist.barrier()  # The first process has now put the folder in order.
        directory = RunDirectory(folder, manifest)
        directory.require_intact()
        if not (folder / "run.json").exists() or directory.num_finished == 0:
            directory.commit()
        yield directory


def read_run(folder: Path) -> RunDirectory:
    """Open a run directory for reading; what a crash left half written is put in order first.

    Raises:
        ValueError: If the folder holds no run, or a symbolic link, or the tasks' files are damaged.
    """
    return RunDirectory(folder, settled_manifest(folder))


def settled_manifest(folder: Path) -> dict[str, Any]:
    """Read `run.json`; what a crash left half written is put in order first.

    Raises:
        ValueError: If the folder holds no run, or a symbolic link, or `run.json` is damaged.
    """
    require_no_links(folder)
    manifest = read_manifest(folder)
    if not (folder / STAGED).exists():
        return manifest
    try:
        with locked(folder):
            manifest = read_manifest(folder)
            Store(folder, manifest).recover(UNFINISHED)
            return manifest
    except InUseError:  # Its owner is at it, and puts it in order itself.
        return read_manifest(folder)


def _manifest(folder: Path, config: dict[str, Any], tasks: list[str], extend: bool) -> dict[str, Any]:
    """Return the manifest of the run that is there if it may be gone on with, or a new one."""
    if not (folder / "run.json").exists():
        return new_manifest(config, tasks)
    found = read_manifest(folder)
    before, now = found["config"], config
    if extend:
        mine = {name: table for name, table in config["tasks"].items() if name in found["tasks"]}
        now = {**config, "tasks": mine} | {key: before.get(key) for key in ("more", "first_tasks")}
    different = differences(before, now)
    if found["tasks"] != (tasks[: len(found["tasks"])] if extend else tasks):
        different.append(f"tasks were {found['tasks']}, are {tasks}")
    if not different:
        return found
    if found["tasks_finished"] == 0 and not any(name.startswith(f"{UNFINISHED}/") for name in found["files"]):
        return new_manifest(config, tasks)  # Nothing is lost by starting over, perhaps with what was mended.
    raise ValueError(
        f"{folder} holds another run ({'; '.join(different)}); give another --output. To start"
        f" from the tasks that are finished here: --fork {folder} --output NEW"
    )
