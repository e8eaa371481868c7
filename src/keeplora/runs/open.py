"""How a run directory is opened: put in order after a crash, checked, by one process, and only for its own run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from keeplora.config import differences, parse
from keeplora.data.benchmark import TaskSpec
from keeplora.errors import InUseError
from keeplora.layers.distributed import is_main_process
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import STAGED, Store, require_no_links
from keeplora.runs.config import RunConfig, Sourced, settle
from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.runs.manifest import locked, new_manifest, read_manifest
from keeplora.runs.schemas import require_config
from keeplora.training.trainer import TrainConfig, best_device


@contextmanager
def open_run(
    folder: Path,
    config: dict[str, Any],
    tasks: list[str],
    *,
    sources: dict[str, str] | None = None,
    extend: bool = False,
) -> Iterator[RunDirectory]:
    """Open a run directory for writing: a new one, or one of the same configuration, to resume it.

    Args:
        folder: The run directory.
        config: What is to be run, as plain values.
        tasks: The names of the tasks.
        sources: Where the settings came from, for a new run.
        extend: Whether a finished run may be given more tasks than it had.

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
        manifest = _manifest(folder, config, tasks, sources or {}, extend)
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


def _manifest(
    folder: Path, config: dict[str, Any], tasks: list[str], sources: dict[str, str], extend: bool
) -> dict[str, Any]:
    """Return the manifest of the run that is there if it may be gone on with, or a new one."""
    if not (folder / "run.json").exists():
        return new_manifest(config, tasks, sources)
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
        return new_manifest(config, tasks, sources)  # Nothing is lost by starting over, perhaps with what was mended.
    raise ValueError(
        f"{folder} holds another run ({'; '.join(different)}); give another --output. To start"
        f" from the tasks that are finished here: --fork {folder} --output NEW"
    )


def reopen(
    folder: Path, *, split: Literal["test", "validation"] | None = None, track: Track = silent
) -> tuple[RunDirectory, nn.Module, list[StreamTask]]:
    """Load what a run left: its directory, its model after the last finished task, and its tasks in their order.

    Args:
        folder: The run directory.
        split: The examples to evaluate on; the run's own if not given.
        track: Shows progress over the images that are read.

    Raises:
        ValueError: If no task is finished, the model was not saved, or a file is missing or damaged.
    """
    directory = read_run(folder)
    if directory.num_finished == 0:
        raise ValueError(f"{folder} has no model yet: no task is finished; go on with the run first")
    if not any(name.startswith("model/") for name in directory.manifest["files"]):
        raise ValueError(f"{folder} was run with save_model = False and has no model; run it again with save_model")
    directory.require_intact("model/")
    config = config_of(directory)
    config = replace(config, model=str(folder / "model"), evaluation=split or config.evaluation)
    model, tasks = open_stream(config, track)
    for index, task in enumerate(tasks[: directory.num_finished]):
        record, adapter = directory.record(index)
        if record.head:
            task.load_head(record.head)
    if not record.merged:
        method = find_method(config.method)[0](config.options, seed=config.seed)
        model = method.replay(model, record, adapter)
    return directory, model, tasks


def config_of(directory: RunDirectory) -> RunConfig:
    """Return the configuration that a run was started with.

    Raises:
        ValueError: If `run.json` holds none, or one that is no longer possible; the message names the key.
    """
    return settle([settings_of_run(directory)])


def settings_of_run(directory: RunDirectory) -> Sourced:
    """Return the settings that a run was started with, as a table, after the file that they are in.

    Raises:
        ValueError: If `run.json` holds none; the message names the key.
    """
    path = directory.folder / "run.json"
    require_config(directory.manifest["config"], directory.manifest["tasks"], path)
    values = dict(directory.manifest["config"])
    for name, table in values.pop("tasks").items():
        parse(TaskSpec, table, source=f"{path}: task {name!r}")
    return str(path), {**values, "output": directory.folder}


def load_stream(
    model: str = "mini",
    benchmark: str = "mini",
    *,
    batch_size: int = 64,
    evaluation: Literal["test", "validation"] = "test",
    seed: int = 0,
    track: Track = silent,
) -> tuple[nn.Module, list[StreamTask]]:
    """Load a model, in float32 on the best device, and the tasks of a benchmark for it.

    Args:
        model: The embedded model, a hub name, or a folder.
        benchmark: Name of a benchmark, or path of its TOML file.
        batch_size: Images in a batch.
        evaluation: The split to evaluate on, test or validation.
        seed: Seed of the order of the training batches.
        track: Shows progress over the images that are read.

    Raises:
        ValueError: If the model, the benchmark or the data is wrong; the message names what.
    """
    train = TrainConfig(batch_size=batch_size)
    config = RunConfig(benchmark=benchmark, model=model, seed=seed, evaluation=evaluation, train=train)
    return open_stream(config, track)


def open_stream(config: RunConfig, track: Track = silent) -> tuple[nn.Module, list[StreamTask]]:
    """Load the model of a run, in float32 on the best device, and its tasks in their order."""
    family, source = family_of(config.model), locate(config.model)
    tasks = family.tasks(
        source,
        config.stream,
        batch_size=config.train.batch_size,
        evaluation=config.evaluation,
        seed=config.seed,
        track=track,
    )
    return family.load(source).to(best_device()), tasks
