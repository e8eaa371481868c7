"""The run directory: configuration, what each task left, scores, merged model, as safetensors and JSON only."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from keeplora.config import read_json, require
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.layers.lora import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter
from keeplora.methods.base import TaskRecord
from keeplora.models.registry import family_of, locate
from keeplora.runs.atomic_store import Store
from keeplora.runs.manifest import Form
from keeplora.subspace.certificate import certificate_to_json
from keeplora.training.profiling import Costs
from keeplora.training.state_file import aligned

PREDICTIONS = "predictions.jsonl.gz"  # What a generative model answered on all tasks: untouched, or after a task.
UNFINISHED = "unfinished"  # Folder of what the task that is being learned has finished so far.


class _Measured(Form):
    seconds: FiniteFloat
    peak_memory_mb: FiniteFloat


class _UntouchedModel(Form):
    zero_shot: list[FiniteFloat]
    model_digest: str
    start: dict[str, _Measured]
    probes: dict[str, FiniteFloat] = Field(default_factory=dict)


class _FinishedTask(Form):
    name: str
    scores: list[FiniteFloat]
    phases: dict[str, _Measured]
    certificate: Any  # Checked by who reads it.
    digest: str = ""
    merged: bool = True
    probes: dict[str, FiniteFloat] = Field(default_factory=dict)


class RunDirectory(Store):
    """Reads and writes one run directory; `open_run` and `read_run` make one. `tasks` are the `task.json` of each."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self.tasks: list[dict[str, Any]] = []
        if self.num_finished or "zero_shot" in manifest:
            self._require("run.json", _UntouchedModel, manifest, "zero_shot")
        for index in range(self.num_finished):
            name = f"{task_folder(index, manifest['tasks'])}/task.json"
            self.tasks.append(read_json(self.read(name), folder / name))
            self._require(name, _FinishedTask, self.tasks[-1], "scores")
            if self.tasks[-1].get("probes", {}).keys() != manifest.get("probes", {}).keys():
                raise ValueError(f"{folder / name} is damaged or not of keeplora: it has other probes than run.json")

    def _require(self, name: str, form: type[Form], values: dict[str, Any], row: str) -> None:
        """Check that a file has its form, and a score for each task."""
        require(form, values, str(self.folder / name))
        if (num_scores := len(values[row])) != (num_tasks := len(self.manifest["tasks"])):
            place = f"{self.folder / name} is damaged or not of keeplora"
            raise ValueError(f"{place}: it has {num_scores} scores for {num_tasks} tasks")

    @property
    def num_finished(self) -> int:
        """How many tasks are finished."""
        return int(self.manifest["tasks_finished"])

    @property
    def is_complete(self) -> bool:
        """Whether every task is finished."""
        return self.num_finished == len(self.manifest["tasks"])

    def results(self) -> Results:
        """Return the scores so far, from the files."""
        config = self.manifest["config"]
        measured = [*self.manifest["start"].items(), *(cost for task in self.tasks for cost in task["phases"].items())]
        seconds: dict[str, float] = {}
        for name, cost in measured:
            seconds[name] = seconds.get(name, 0.0) + cost["seconds"]
        return Results(
            method=config["method"],
            benchmark=" + ".join(dict.fromkeys(map(_name_of, (config["benchmark"], *config["more"])))),
            model=_without_folder(config["model"]),
            seed=config["seed"],
            tasks=self.manifest["tasks"],
            zero_shot=self.manifest["zero_shot"],
            accuracy=[task["scores"] for task in self.tasks],
            seconds=seconds,
            peak_memory_mb=max((cost["peak_memory_mb"] for _, cost in measured), default=0.0),
            probes={
                name: [score, *(task["probes"][name] for task in self.tasks)]
                for name, score in self.manifest.get("probes", {}).items()
            },
            settings=_settings_of(self.manifest),
        )

    def start(
        self, model_digest: str, zero_shot: list[float], phases: Costs, probes: dict[str, float] | None = None
    ) -> None:
        """Record the untouched model: the hash of its weights, and its scores on the tasks and on the probes.

        What else was handed in before is committed with it.
        """
        self.manifest |= {"model_digest": model_digest, "zero_shot": zero_shot, "start": phases}
        if probes:
            self.manifest["probes"] = probes
        self.commit()

    def add_task(self, record: TaskRecord, details: dict[str, Any], model: nn.Module | None) -> None:
        """Commit the next finished task: its adapter, directions, head and `task.json`, the merged model, the scores.

        `details` is what else `task.json` holds, and a certificate in place of the record's. `model` is None to write
        none.
        """
        folder = task_folder(self.num_finished, self.manifest["tasks"])
        if record.adapter is not None:
            for name, content in record.adapter.files().items():
                self.write(f"{folder}/adapter/{name}", content)
        for name, tensors in (("subspace", record.directions), ("head", record.head), ("state", record.state)):
            if tensors:
                self.write_tensors(f"{folder}/{name}.safetensors", tensors)
        if "certificate" not in details:
            merge = {"merge_error": record.merge_error, "merge_loss": record.merge_loss}
            certificate = {**certificate_to_json(record.certificate), **merge}
            if record.surviving_gradient:
                certificate["surviving_gradient"] = record.surviving_gradient
            details = {**details, "certificate": certificate, "merged": record.merged}
        self.tasks.append({**details, "digest": record.whole_digest()})
        self.manifest["tasks_finished"] += 1
        if model is not None:
            name = self.manifest["config"]["model"]
            self.write_folder("model", partial(family_of(name).save, model, locate(name)))
        self.remove(f"{UNFINISHED}/")
        self.manifest.pop("now", None)
        self.manifest["phase"] = "complete" if self.is_complete else "running"
        self._commit_scores([self.num_finished - 1])

    def predictions(self, index: int | None = None) -> bytes:
        """Return what the model answered after a task, or untouched, as a file; nothing if none was kept."""
        return self.read(name) if (name := self._predictions(index)) in self.files else b""

    def write_predictions(self, content: bytes, index: int | None = None) -> None:
        """Hand in what the model answered after a task, or untouched, for the next commit; nothing if it is empty.

        One such file behind another is one of both.
        """
        if content:
            self.write(self._predictions(index), content)

    def _predictions(self, index: int | None) -> str:
        return PREDICTIONS if index is None else f"{task_folder(index, self.manifest['tasks'])}/{PREDICTIONS}"

    def widen(self, config: dict[str, Any], tasks: list[str], columns: list[list[float]]) -> None:
        """Let the run have more tasks, and commit the scores on them of every state so far, the untouched one first."""
        self.manifest |= {"config": config, "tasks": tasks, "phase": "running"}
        self.manifest["zero_shot"] = self.manifest["zero_shot"] + columns[0]
        for details, scores in zip(self.tasks, columns[1:], strict=True):
            details["scores"] = details["scores"] + scores
        self.remove("report.html")
        self._commit_scores(range(self.num_finished))

    def _commit_scores(self, changed: Iterable[int]) -> None:
        """Commit what was handed in, with `metrics.json` and the `task.json` of some tasks."""
        folders = {index: task_folder(index, self.manifest["tasks"]) for index in changed}
        files = {f"{folder}/task.json": self.tasks[index] for index, folder in folders.items()}
        for name, value in (files | {"metrics.json": self.results().to_json()}).items():
            self.write(name, (json.dumps(value, indent=1) + "\n").encode())
        self.commit()

    def record(self, index: int) -> tuple[TaskRecord, Path]:
        """Read back what a finished task left, and the folder of its adapter; ValueError names a damaged file."""
        folder = task_folder(index, self.manifest["tasks"])
        adapter, saved = self.folder / folder / "adapter", None
        if (weights := f"{folder}/adapter/{WEIGHTS_FILE}") in self.files:
            config = self.read(f"{folder}/adapter/{CONFIG_FILE}")
            saved = SavedAdapter(SavedAdapter.config_from(config, adapter / CONFIG_FILE), self._tensors(weights))
        return TaskRecord(
            adapter=saved,
            directions=self._tensors(f"{folder}/subspace.safetensors"),
            head=self._tensors(f"{folder}/head.safetensors"),
            state=self._tensors(f"{folder}/state.safetensors"),
            merged=self.tasks[index].get("merged", True),
        ), adapter

    def _tensors(self, name: str) -> dict[str, Any]:
        try:
            return aligned(load(self.read(name))) if name in self.files else {}
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None


def _settings_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a run learned with, by name, and where a task has its own epochs."""
    config = manifest["config"]
    own = {f"epochs of {name}": epochs for name, table in config["tasks"].items() if (epochs := table.get("epochs"))}
    shared = {"evaluation": config["evaluation"], "processes": manifest.get("processes", 1)}
    return {**config["train"], **own, **config["options"], **shared}


def _name_of(benchmark: str) -> str:
    """Return the name of a benchmark, or of its file without folder and ending."""
    return Path(benchmark).stem if benchmark.endswith(".toml") else benchmark


def _without_folder(name: str) -> str:
    """Return the name of a file or folder of this machine without where it lies, any other name as it is."""
    return Path(name).name if Path(name).is_absolute() else name


def task_folder(index: int, tasks: list[str]) -> str:
    """Return the folder of a task in a run directory."""
    return f"tasks/{index + 1:02d}-{tasks[index]}"
