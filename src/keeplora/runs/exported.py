"""An exported folder, opened again to be evaluated: what its `export.json` tells, its model, its tasks."""

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load
from torch import nn

from keeplora.config import read_json, require
from keeplora.layers import lora
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import EMBEDDED, family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.config import RunConfig, settle
from keeplora.runs.manifest import Form
from keeplora.runs.open import RecordedConfig, require_tasks, require_unseen
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


def is_export(folder: Path) -> bool:
    """Tell whether a folder was written by `keeplora export`."""
    return (folder / EXPORT).is_file() and not (folder / "run.json").exists()


def reopen_export(
    folder: Path,
    *,
    split: Literal["test", "validation"] | None = None,
    benchmark: Path | None = None,
    track: Track = silent,
) -> tuple[Export, RunConfig, nn.Module, list[StreamTask]]:
    """Load what was exported, in float32, and the tasks of its run, which evaluate on `split` or the run's own.

    `benchmark` is where the benchmark's file is now, if it was moved. ValueError says what is wrong or missing.
    """
    path = folder / EXPORT
    told = require(Export, read_json(path.read_bytes(), path), str(path))
    require(RecordedConfig, values := dict(told.config), str(path))
    recorded = values.pop("tasks", {})
    values["benchmark"] = _seen_from(folder, values["benchmark"]) if benchmark is None else str(benchmark)
    values["more"] = [_seen_from(folder, name) for name in values["more"]]
    if values["model"] not in EMBEDDED and (place := folder / values["model"]).is_dir():
        values["model"] = str(place.resolve())
    config = settle([(str(path), {**values, "output": folder})])
    require_tasks(folder, recorded, config)
    require_unseen(folder, config, split)
    evaluation = split or config.evaluation
    source = str(folder) if told.format == "merged" else locate(config.model)
    family = family_of(source)
    tasks = family.tasks(
        source, config.stream, batch_size=config.train.batch_size, evaluation=evaluation, seed=config.seed, track=track
    )
    model = family.load(source)
    for place in [folder] if told.format == "adapter" else [folder / name for name in told.adapters]:
        model = lora.merge_from(model, place)
    for task in tasks:
        if task.name in told.heads:
            task.load_head(load((folder / told.heads[task.name]).read_bytes()))
    return told, config, model.to(best_device()), tasks


def _seen_from(folder: Path, name: str) -> str:
    """Return where a benchmark's file lies that was written as seen from an export; the name of another as it is."""
    if not name.endswith(".toml"):
        return name
    if not (place := (folder / name).resolve()).is_file():
        raise ValueError(f"{place} is not there any more; say with --benchmark where the benchmark's file is")
    return str(place)
