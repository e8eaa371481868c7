"""How a run directory is opened: put in order after a crash, checked, by one process, and only for its own run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from keeplora.config import differences, parse, require
from keeplora.data.benchmark import TaskSpec
from keeplora.data.readers import stored_splits
from keeplora.errors import InUseError
from keeplora.layers.distributed import is_main_process
from keeplora.methods.registry import find_method
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import CURE, STAGED, Store, require_no_links
from keeplora.runs.config import RunConfig, Sourced, plain_values, settle
from keeplora.runs.directory import RunDirectory
from keeplora.runs.manifest import Form, Settings, locked, new_manifest, read_manifest
from keeplora.training.trainer import TrainConfig, best_device

LEFT_BY_A_START = {"run.json.part", "lock", STAGED}
"""What a run that was cut off before its first commit can leave in its directory."""


PLACES = ("benchmark", "more", "model", "data")  # Settings that can be paths.


@dataclass(frozen=True)
class Places:
    """Where the benchmark's file and the folder of its data are now, if they are not where a run knew them."""

    benchmark: Path | None = None
    data: Path | None = None

    def to_settings(self) -> dict[str, str]:
        """Return the settings that these take the place of."""
        return {key: str(path) for key, path in vars(self).items() if path is not None}


IN_PLACE = Places()  # Nothing was moved alone.


@contextmanager
def open_run(
    folder: Path, config: dict[str, Any], tasks: list[str], *, settings: Settings | None = None, extend: bool = False
) -> Iterator[RunDirectory]:
    """Open a run directory for writing: a new one, or one of the same configuration, to resume it.

    `config` says what is to be run, as plain values; `settings`, where a new run's came from; `extend`, whether a
    finished run may be given more tasks. Tensors may be large and are checked when they are read, other files here.
    ValueError says that the folder is no run, or another one, or damaged, or another process writes to it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    found = {path.name for path in folder.iterdir()}
    if "run.json" not in found and found - LEFT_BY_A_START:
        raise ValueError(f"{folder} is not empty and holds no run; give another --output, or empty it")
    require_no_links(folder)
    with locked(folder) if is_main_process() else nullcontext():
        has_begun = (folder / "run.json").exists()
        manifest = read_manifest(folder) if has_begun else new_manifest(config, tasks, settings)
        Store(folder, manifest).recover()
        if dist.is_initialized():
            dist.barrier()  # The first process has now put the folder in order.
        different = _differences_of(manifest, config, tasks, extend=extend)
        if different and (manifest["tasks_finished"] or "now" in manifest):
            more = " --more FILE" if manifest["tasks_finished"] == len(manifest["tasks"]) else ""
            raise ValueError(
                f"{folder} holds another run ({'; '.join(different)}); give another --output. To start"
                f" from the tasks that are finished here: --fork {folder}{more} --output NEW"
            )
        if different:  # Nothing is lost by starting over, perhaps with what was mended.
            manifest = new_manifest(config, tasks, settings)
        manifest["config"] |= {key: config[key] for key in PLACES if key in config and not (extend and key == "more")}
        manifest["processes"] = dist.get_world_size() if dist.is_initialized() else 1
        manifest["nearby"] = _seen_from(folder.resolve(), config)
        directory = RunDirectory(folder, manifest)
        require_no_strangers(directory)
        for name in directory.files:
            if not name.endswith(".safetensors"):
                directory.read(name)
        if different or not has_begun:
            directory.commit()
        yield directory


def _differences_of(manifest: dict[str, Any], config: dict[str, Any], tasks: list[str], *, extend: bool) -> list[str]:
    """Say in what a run differs from what is asked for; one that is extended may get more tasks."""
    before, known, now, wanted = manifest["config"], manifest["tasks"], config, tasks
    if extend:
        tables = {name: table for name, table in config["tasks"].items() if name in known}
        now = {**config, "tasks": tables} | {key: before.get(key) for key in ("more", "first_tasks")}
        wanted = tasks[: len(known)]
    return differences(_identity(before), _identity(now)) + (
        [] if known == wanted else [f"tasks were {known}, are {wanted}"]
    )


def _seen_from(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return where the files of a configuration lie seen from a run: they are found if all is moved together."""
    paths = [config.get("benchmark", ""), config.get("model", ""), config.get("data") or "", *config.get("more", [])]
    return {path: os.path.relpath(path, folder) for path in paths if Path(path).is_absolute()}


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a configuration makes a run: the content of its tasks and of its model, not where they lie."""
    is_path = Path(config.get("model", "")).is_absolute()
    return {key: value for key, value in config.items() if key not in PLACES or (key == "model" and not is_path)}


def read_run(folder: Path) -> RunDirectory:
    """Open a run directory for reading; `task.json` of each task is checked, other files when they are read."""
    directory = RunDirectory(folder, settled_manifest(folder))
    require_no_strangers(directory)
    return directory


def require_no_strangers(store: Store) -> None:
    """Check that nothing lies beside the files of a run: what loads the model would take it for a part of it."""
    if found := store.strangers():
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(f"{found[0]} is not of this run{more}; move it out of {store.folder}")


def settled_manifest(folder: Path) -> dict[str, Any]:
    """Read `run.json`; what a crash left half written is put in order first."""
    require_no_links(folder)
    manifest = read_manifest(folder)
    if (folder / STAGED).exists():
        with suppress(InUseError), locked(folder):  # If it is in use, its owner puts it in order.
            Store(folder, read_manifest(folder)).recover()
        manifest = read_manifest(folder)
    return manifest


def reopen(
    folder: Path,
    *,
    split: Literal["test", "validation"] | None = None,
    places: Places = IN_PLACE,
    track: Track = silent,
) -> tuple[RunDirectory, nn.Module, list[StreamTask]]:
    """Load what a run left: its directory, its model after the last finished task, and its tasks in their order.

    They evaluate on `split`, or the run's own; `places` tell what was moved where. ValueError: no task
    is finished, no model was saved, a file is damaged, other tasks than the run's are in the benchmark, or the split
    has images that the run was trained on.
    """
    directory = read_run(folder)
    if directory.num_finished == 0:
        raise ValueError(f"{folder} has no model yet: no task is finished; resume the run first")
    config = config_of(directory, places)
    files = [name for name in directory.files if name.startswith("model/")]
    if not files and not config.keeps_beside:
        raise ValueError(f"{folder} was run with save_model = False and has no model; run it again with save_model")
    if flaws := directory.damaged(files):
        raise ValueError(flaws[0] + CURE)
    require_recorded_tasks(directory, config)
    require_unseen(folder, config, split)
    source = config.model if config.keeps_beside else str(folder / "model")
    config = replace(config, model=source, evaluation=split or config.evaluation)
    model, tasks = open_stream(config, track)
    if config.evaluation == directory.manifest["config"]["evaluation"]:
        require_same_data(directory, tasks)
    method = find_method(config.method)[0](config.options, seed=config.seed)
    for index, task in enumerate(tasks[: directory.num_finished]):
        record, adapter = directory.record(index)
        if record.head:
            task.load_head(record.head)
        if config.keeps_beside and record.merged and record.adapter is not None:
            model = method.with_updates(model, record, adapter)
    if not record.merged:
        model = method.replay(model, record, adapter)
    return directory, model, tasks


def config_of(directory: RunDirectory, places: Places = IN_PLACE) -> RunConfig:
    """Return the configuration that a run was started with; ValueError names a key that is wrong, or wrong by now.

    Files that were moved together with the run are found beside it; `places` tell where others are now.
    """
    source, values = settings_of_run(directory)
    return settle([(source, {**values, **places.to_settings()})])


def require_same_data(directory: RunDirectory, tasks: list[StreamTask]) -> None:
    """Check that the data of tasks are those that a run recorded: their classes, and the labels of their images."""
    require_recorded_data(directory.folder, directory.manifest.get("data", {}), tasks)


def require_recorded_data(folder: Path, data: dict[str, Any], tasks: list[StreamTask]) -> None:
    """Check that the data of tasks are those that were recorded in a folder."""
    for task in tasks:
        recorded = data.get(task.name)
        if recorded is None or not task.data or recorded == task.data:
            continue
        was, now = (set(one["classes"]) for one in (recorded, task.data))
        new, gone = (", ".join(sorted(names)) for names in (now - was, was - now))
        change = f"new classes: {new}" * bool(new) + "; " * bool(new and gone) + f"classes gone: {gone}" * bool(gone)
        if not change:
            change = f"images were {recorded['images']}, are {task.data['images']}, or have other labels"
        raise ValueError(
            f"task {task.name!r}: its data are not those that {folder} was begun with ({change}); bring them"
            " back, or start another run"
        )


def require_recorded_tasks(directory: RunDirectory, config: RunConfig) -> None:
    """Check that the benchmark still has the tasks that a run recorded: scores would stand under wrong names."""
    require_tasks(directory.folder, directory.manifest["config"]["tasks"], config)


def require_tasks(folder: Path, recorded: dict[str, Any], config: RunConfig) -> None:
    """Check that the benchmark still has the tasks whose tables were recorded in a folder."""
    now = plain_values(config)["tasks"]
    for name, table in recorded.items():
        if "hub" not in table:  # An export does not tell where data lay.
            now.get(name, {}).pop("hub", None)
    changes = differences({"table": recorded}, {"table": {name: now.get(name, {}) for name in recorded}})
    if not changes and list(now)[: len(recorded)] != list(recorded):
        changes = [f"its tasks were {', '.join(recorded)}, are {', '.join(now)}"]
    if changes:
        more = f", and {len(changes) - 1} more changes" if len(changes) > 1 else ""
        cure = "undo the change, or say with --benchmark where the file is that the run knows"
        first = changes[0].removeprefix("table.")
        raise ValueError(f"{config.benchmark} is not what {folder} was begun with: {first}{more}; {cure}")


def require_unseen(folder: Path, config: RunConfig, split: str | None) -> None:
    """Check that a split to evaluate on has no images that a run with this configuration was trained on."""
    if split != "validation" or split == config.evaluation:
        return
    for spec in config.stream:
        if "validation" not in stored_splits(spec):
            flaw = f"a fifth of its training images would take its place, and {folder} was trained on these"
            cure = "leave out --split, or run anew with --evaluation validation"
            raise ValueError(f"task {spec.name!r} has no validation split: {flaw}; {cure}")


def _moved(directory: RunDirectory, path: str) -> str:
    """Return where a file or folder of a run's settings is: in its place, or where it lay seen from the run."""
    place = directory.folder / directory.manifest.get("nearby", {}).get(path, path)
    return str(place.resolve()) if Path(path).is_absolute() and not Path(path).exists() and place.exists() else path


class RecordedConfig(Form):
    """What is recorded of a run's configuration, at the least."""

    benchmark: str
    model: str
    method: str
    seed: int
    evaluation: Literal["test", "validation"]
    more: list[str]
    tasks: dict[str, dict[str, Any]]
    train: dict[str, Any]
    options: dict[str, Any]


def settings_of_run(directory: RunDirectory) -> Sourced:
    """Return the file that a run's settings are in, and these as a table; ValueError names a key that is wrong."""
    path, tasks = directory.folder / "run.json", directory.manifest["tasks"]
    values = dict(directory.manifest["config"])
    tables = require(RecordedConfig, values, str(path)).tasks
    if list(tables) != tasks:
        flaw = f"its tasks are {tasks}, its tables those of {list(tables)}"
        raise ValueError(f"{path} is damaged or not of keeplora: {flaw}")
    values.pop("probes", None)  # The benchmark has them.
    for name, table in values.pop("tasks").items():
        parse(TaskSpec, table, source=f"{path}: task {name!r}")
    for key in ("benchmark", "model", "data"):
        if values.get(key) is not None:
            values[key] = _moved(directory, values[key])
    values["more"] = [_moved(directory, one) for one in values["more"]]
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

    `model` is the embedded model, a hub name, or a folder, `benchmark` a name or the path of a TOML file. The tasks
    evaluate on the split `evaluation`; `seed` draws the order of training batches. A ValueError names what is wrong.
    """
    train = TrainConfig(batch_size=batch_size)
    config = RunConfig(benchmark=benchmark, model=model, seed=seed, evaluation=evaluation, train=train)
    return open_stream(config, track)


def open_probes(config: RunConfig, track: Track = silent) -> list[StreamTask]:
    """Make the tasks that a run evaluates and never learns."""
    if not config.probes:
        return []
    source, evaluation = locate(config.model), config.evaluation
    return family_of(config.model).tasks(
        source, config.probes, batch_size=config.train.batch_size, evaluation=evaluation, seed=config.seed, track=track
    )


def open_stream(config: RunConfig, track: Track = silent) -> tuple[nn.Module, list[StreamTask]]:
    """Load the model of a run, on the best device, and its tasks in their order."""
    family, source = family_of(config.model), locate(config.model)
    batch_size, evaluation, seed = config.train.batch_size, config.evaluation, config.seed
    tasks = family.tasks(source, config.stream, batch_size=batch_size, evaluation=evaluation, seed=seed, track=track)
    return family.load(source, config.precision).to(best_device()), tasks
