"""An exported folder, opened again to be evaluated: what its `export.json` tells, its model, its tasks."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from keeplora.config import read_json, require
from keeplora.layers import lora, merging
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import EMBEDDED, family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import require_no_links
from keeplora.runs.config import RunConfig, settle
from keeplora.runs.manifest import Form
from keeplora.runs.open import IN_PLACE, Places, RecordedConfig, require_recorded_data, require_tasks, require_unseen
from keeplora.training.trainer import best_device

EXPORT = "export.json"


class Export(Form):
    """What `export.json` holds: the settings of the run, where things lie seen from here, and the scores to expect."""

    format: Literal["merged", "adapter", "adapters"]
    config: dict[str, Any]
    adapters: list[str]  # Their folders, in the order they were learned.
    heads: dict[str, str]  # Task and file of each classifier.
    tasks: list[str]
    scores: list[float]
    data: dict[str, Any]  # What the tasks were made of, as in run.json.


def is_export(folder: Path) -> bool:
    """Tell whether a folder was written by `keeplora export`."""
    return (folder / EXPORT).is_file() and not (folder / "run.json").exists()


def reopen_export(
    folder: Path,
    *,
    split: Literal["test", "validation"] | None = None,
    places: Places = IN_PLACE,
    track: Track = silent,
) -> tuple[Export, RunConfig, nn.Module, list[StreamTask]]:
    """Load what was exported, in float32, and the tasks of its run, which evaluate on `split` or the run's own.

    `places` tell what was moved where. ValueError says what is wrong or missing.
    """
    require_no_links(folder)
    path = folder / EXPORT
    told = require(Export, read_json(path.read_bytes(), path), str(path))
    require(RecordedConfig, told.config, str(path))
    config = settle([(str(path), _settings_of(folder, told, places))])
    require_tasks(folder, told.config["tasks"], config)
    require_unseen(folder, config, split)
    evaluation = split or config.evaluation
    source = str(folder) if told.format == "merged" else locate(config.model)
    family = family_of(source)
    tasks = family.tasks(
        source, config.stream, batch_size=config.train.batch_size, evaluation=evaluation, seed=config.seed, track=track
    )
    if [task.name for task in tasks] != told.tasks or len(told.scores) != len(tasks):
        raise ValueError(f"{path} tells of the tasks {', '.join(told.tasks)}, its benchmarks have others, or more")
    if evaluation == config.evaluation:
        require_recorded_data(folder, told.data, tasks)
    model = family.load(source)
    for place in _adapters_of(folder, told):
        model = merging.merge_from(model, place)
    for task in tasks:
        if task.name in told.heads:
            task.load_head(_head(folder, told.heads[task.name], told.data.get(task.name, {}).get("classes")))
    return told, config, model.to(best_device()), tasks


def _settings_of(folder: Path, told: Export, places: Places) -> dict[str, Any]:
    """Return the settings of the run, with the files where they are now."""
    values = {key: value for key, value in told.config.items() if key not in ("tasks", "probes")}
    if places.benchmark is None:
        values["benchmark"] = _seen_from(folder, values["benchmark"], "--benchmark")
    values["more"] = [_seen_from(folder, name, f"the key more of {folder / EXPORT}") for name in values["more"]]
    if values.get("data") is not None:
        values["data"] = str((folder / values["data"]).resolve())
    base = values["model"]
    if base not in EMBEDDED and (adapters := _adapters_of(folder, told)):  # Where people say that it has moved.
        config = adapters[0] / lora.CONFIG_FILE
        base = read_json(config.read_bytes(), config).get("base_model_name_or_path") or base
    if base not in EMBEDDED and (folder / base).is_dir():
        base = str((folder / base).resolve())
    return {**values, **places.to_settings(), "model": base, "output": folder}


def _adapters_of(folder: Path, told: Export) -> list[Path]:
    if told.format != "adapters":
        return [folder] if told.format == "adapter" else []
    return [_inside(folder, name) for name in told.adapters]


def _head(folder: Path, name: str, classes: list[str] | None) -> dict[str, Tensor]:
    """Read a classifier; ValueError says that it is none, or of other classes."""
    path = _inside(folder, name)
    try:
        head = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if list(head) != ["weight"] or head["weight"].dim() != 2 or len(head["weight"]) != len(classes or head["weight"]):
        raise ValueError(f"{path} is not the classifier of {len(classes or ())} classes")
    return head


def _inside(folder: Path, name: str) -> Path:
    """Return the place of a file or folder of an export; ValueError if it is not in there."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not (folder / name).exists():
        raise ValueError(f"{folder / EXPORT} names {name!r}, which is not in {folder}")
    return folder / name


def _seen_from(folder: Path, name: str, cure: str) -> str:
    """Return where a benchmark's file lies that was written as seen from an export; the name of another as it is."""
    if not name.endswith(".toml"):
        return name
    if not (place := (folder / name).resolve()).is_file():
        raise ValueError(f"{place} is not there any more; say with {cure} where the file is")
    return str(place)
