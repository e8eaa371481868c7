"""The run directory: what was configured, what each task left behind, the scores, the merged model.

Safetensors and JSON only. What belongs together is written together or not at all (see `store`), so that a reader never
sees half a task, and every file's SHA-256 stands in `run.json`, so that a damaged one is noticed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.layers.lora import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter
from keeplora.methods.base import TaskRecord
from keeplora.runs.atomic_store import Store
from keeplora.runs.schemas import read_task, require_start
from keeplora.subspace.certificate import certificate_to_json
from keeplora.training.profiling import Costs
from keeplora.training.state_file import aligned

UNFINISHED = "unfinished"
"""Folder of what the task that is being learned has finished so far."""

Save = Callable[[Path], None]
"""Writes the merged model to a folder."""


class RunDirectory(Store):
    """Reads and writes one run directory. Make one with `open_run`; one that only reads with the manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        if self.num_finished or "zero_shot" in manifest:
            require_start(manifest, folder / "run.json")
        self.tasks = [self._task_json(index) for index in range(self.num_finished)]

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
        phases = [self.manifest["start"], *(task["phases"] for task in self.tasks)]
        seconds: dict[str, float] = {}
        for name, measured in ((name, measured) for phase in phases for name, measured in phase.items()):
            seconds[name] = seconds.get(name, 0.0) + measured["seconds"]
        return Results(
            method=config["method"],
            benchmark=" + ".join([config["benchmark"], *config["more"]]),
            model=config["model"],
            seed=config["seed"],
            tasks=self.manifest["tasks"],
            zero_shot=self.manifest["zero_shot"],
            accuracy=[task["scores"] for task in self.tasks],
            seconds=seconds,
            peak_memory_mb=max((m["peak_memory_mb"] for phase in phases for m in phase.values()), default=0.0),
        )

    def start(self, model_digest: str, zero_shot: list[float], phases: Costs) -> None:
        """Record the untouched model: the hash of its weights, and its scores."""
        self.manifest |= {"model_digest": model_digest, "zero_shot": zero_shot, "start": phases}
        self.commit()

    def add_task(self, record: TaskRecord, details: dict[str, Any], save_model: Save | None) -> None:
        """Record the next task: its adapter, directions, head, certificate, scores and times; and the merged model.

        Args:
            record: What the method left behind.
            details: What else `task.json` holds: `scores`, `phases`, `losses`.
            save_model: Writes the merged model to a folder; None if it is the one that is there.
        """
        folder = self.task_folder(self.num_finished)
        if record.adapter is not None:
            for name, content in record.adapter.files().items():
                self.write(f"{folder}/adapter/{name}", content)
        for name, tensors in (("subspace", record.directions), ("head", record.head), ("state", record.state)):
            if tensors:
                self.write_tensors(f"{folder}/{name}.safetensors", tensors)
        certificate = {**certificate_to_json(record.certificate), "merge_error": record.merge_error}
        if record.surviving_gradient:
            certificate["surviving_gradient"] = record.surviving_gradient
        self.finish_task({**details, "certificate": certificate, "merged": record.merged})
        self.commit_tasks(save_model)

    def copy_task(self, other: "RunDirectory", index: int, details: dict[str, Any]) -> None:
        """Hand in as the next task what a finished one of another run left, with a `task.json` of its own."""
        folder = other.task_folder(index)
        for name in other.files:
            if name.startswith(f"{folder}/") and not name.endswith("/task.json"):
                self.write(self.task_folder(self.num_finished) + name.removeprefix(folder), other.read(name))
        self.finish_task(details)

    def finish_task(self, details: dict[str, Any]) -> None:
        """Hand in `task.json` of the next task, and count it as finished with the next commit."""
        self.write_json(f"{self.task_folder(self.num_finished)}/task.json", details)
        self.tasks.append(details)
        self.manifest["tasks_finished"] += 1

    def commit_tasks(self, save_model: Save | None) -> None:
        """Commit the finished tasks that were handed in, with the merged model and the scores."""
        if save_model is not None:
            self.write_folder("model", save_model)
        self.remove(f"{UNFINISHED}/")
        self.manifest.pop("now", None)
        self.manifest["phase"] = "complete" if self.is_complete else "running"
        self.write_json("metrics.json", self.results().to_json())
        self.commit()

    def widen(self, config: dict[str, Any], tasks: list[str], columns: list[list[float]]) -> None:
        """Let the run have more tasks, and commit the scores on them of every state so far, the untouched one first."""
        self.manifest |= {"config": config, "tasks": tasks, "phase": "running"}
        self.manifest["zero_shot"] = self.manifest["zero_shot"] + columns[0]
        for index, (details, scores) in enumerate(zip(self.tasks, columns[1:], strict=True)):
            details["scores"] = details["scores"] + scores
            self.write_json(f"{self.task_folder(index)}/task.json", details)
        self.remove("report.html")
        self.write_json("metrics.json", self.results().to_json())
        self.commit()

    def record(self, index: int) -> tuple[TaskRecord, Path]:
        """Read back what a finished task left, and the folder of its adapter.

        Raises:
            ValueError: If a file is missing or damaged; the message names it.
        """
        folder = self.task_folder(index)
        adapter = self.folder / folder / "adapter"
        saved = None
        if f"{folder}/adapter/{WEIGHTS_FILE}" in self.files:
            name = f"{folder}/adapter/{CONFIG_FILE}"
            config = SavedAdapter.config_from(self.read(name), self.folder / name)
            saved = SavedAdapter(config, self._tensors(f"{folder}/adapter/{WEIGHTS_FILE}"))
        return TaskRecord(
            adapter=saved,
            directions=self._tensors(f"{folder}/subspace.safetensors"),
            head=self._tensors(f"{folder}/head.safetensors"),
            state=self._tensors(f"{folder}/state.safetensors"),
            merged=self.tasks[index].get("merged", True),
        ), adapter

    def require_intact(self, prefix: str = "") -> None:
        """Check the files whose path begins so against their hashes; tensors are checked only if a prefix is given.

        They may be large, and are checked when they are read.

        Raises:
            ValueError: If one is missing or damaged; the message names it.
        """
        for name in self.files:
            if name.startswith(prefix) and (prefix or not name.endswith(".safetensors")):
                self.check(name)

    def write_json(self, name: str, value: object) -> None:
        """Hand in a value as JSON for the next commit."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def task_folder(self, index: int) -> str:
        """Return the folder of a task."""
        return task_folder(index, self.manifest["tasks"])

    def _tensors(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            return aligned(load(self.read(name)))
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None

    def _task_json(self, index: int) -> dict[str, Any]:
        name = f"{self.task_folder(index)}/task.json"
        return read_task(self.read(name), self.manifest["tasks"], self.folder / name)


def task_folder(index: int, tasks: list[str]) -> str:
    """Return the folder of a task in a run directory."""
    return f"tasks/{index + 1:02d}-{tasks[index]}"
