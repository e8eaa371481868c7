"""The model and the tasks of a run again, from its directory alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from keeplora.config import parse
from keeplora.methods.registry import find_method
from keeplora.models.registry import StreamTask
from keeplora.progress import Track, silent
from keeplora.runs.config import RunConfig, open_stream
from keeplora.runs.directory import RunDirectory
from keeplora.runs.open import read_run
from keeplora.runs.schemas import require_config
from keeplora.task import TaskSpec
from keeplora.training.trainer import TrainConfig


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
    path = directory.folder / "run.json"
    source = str(path)
    require_config(directory.manifest["config"], directory.manifest["tasks"], path)
    values = json.loads(json.dumps(directory.manifest["config"]))
    for name, table in values.pop("tasks").items():
        parse(TaskSpec, table, source=f"{source}: task {name!r}")
    options = parse(find_method(values["method"])[0].Config, values.pop("options"), source=source)
    train = parse(TrainConfig, values.pop("train"), source=source)
    return parse(RunConfig, {**values, "output": directory.folder, "train": train, "options": options}, source=source)
