"""The run directory: what was configured, what each task left behind, the scores, the merged model.

Safetensors and JSON only. What belongs together is written together or not at all (see `store`), so that a reader never
sees half a task, and every file's SHA-256 stands in `run.json`, so that a damaged one is noticed.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save

from keeplora.adapter import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter
from keeplora.checkpoint import aligned
from keeplora.manifest import differences, locked, new_manifest, read_manifest
from keeplora.measure import Phases
from keeplora.methods import TaskRecord
from keeplora.results import Results
from keeplora.store import STAGED, Store, is_main_process
from keeplora.subspace import certificate_to_json

UNFINISHED = "unfinished"
"""Folder of what the task that is being learned has finished so far."""

Save = Callable[[Path], None]
"""Writes the merged model to a folder."""


class Ledger(Store):
    """Reads and writes one run directory. Make one with `open_ledger`; one that only reads with the manifest."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
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

    def start(self, model_digest: str, zero_shot: list[float], phases: Phases) -> None:
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
                plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                self.write(f"{folder}/{name}.safetensors", save(plain))
        certificate = {**certificate_to_json(record.certificate), "merge_error": record.merge_error}
        if record.surviving_gradient:
            certificate["surviving_gradient"] = record.surviving_gradient
        self.finish_task({**details, "certificate": certificate, "merged": record.merged}, save_model)

    def finish_task(self, details: dict[str, Any], save_model: Save | None) -> None:
        """Write `task.json` of the next task, the merged model, and the scores, and commit them with the task."""
        self.write_json(f"{self.task_folder(self.num_finished)}/task.json", details)
        if save_model is not None:
            self.write_folder("model", save_model)
        self.remove(f"{UNFINISHED}/")
        self.tasks.append(details)
        self.manifest.pop("now", None)
        self.manifest["tasks_finished"] += 1
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
            config = SavedAdapter.config_from(self.read(f"{folder}/adapter/{CONFIG_FILE}"))
            saved = SavedAdapter(config, self._tensors(f"{folder}/adapter/{WEIGHTS_FILE}"))
        return TaskRecord(
            adapter=saved,
            directions=self._tensors(f"{folder}/subspace.safetensors"),
            head=self._tensors(f"{folder}/head.safetensors"),
            state=self._tensors(f"{folder}/state.safetensors"),
            merged=self.tasks[index].get("merged", True),
        ), adapter

    def require_intact(self, prefix: str = "") -> None:
        """Check the files whose path begins so against their hashes.

        Raises:
            ValueError: If one is missing or damaged; the message names it.
        """
        for name in self.files:
            if name.startswith(prefix):
                self.read(name)

    def write_json(self, name: str, value: object) -> None:
        """Hand in a value as JSON for the next commit."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def task_folder(self, index: int) -> str:
        """Return the folder of a task."""
        return f"tasks/{index + 1:02d}-{self.manifest['tasks'][index]}"

    def _tensors(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            return aligned(load(self.read(name)))
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None

    def _task_json(self, index: int) -> dict[str, Any]:
        return dict(json.loads(self.read(f"{self.task_folder(index)}/task.json")))


@contextmanager
def open_ledger(folder: Path, config: dict[str, Any], tasks: list[str], *, extend: bool = False) -> Iterator[Ledger]:
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
    with locked(folder) if is_main_process() else nullcontext():
        manifest = _manifest(folder, config, tasks, extend)
        Store(folder, manifest).recover(UNFINISHED)
        if dist.is_initialized():
            dist.barrier()  # The first process has now put the folder in order.
        ledger = Ledger(folder, manifest)
        ledger.require_intact()
        if not (folder / "run.json").exists() or ledger.num_finished == 0:
            ledger.commit()
        yield ledger


def read_ledger(folder: Path) -> Ledger:
    """Open a run directory for reading; what a crash left half written is put in order first.

    Raises:
        ValueError: If the folder holds no run, or the tasks' files are damaged, or it is being written to.
    """
    return Ledger(folder, settled_manifest(folder))


def settled_manifest(folder: Path) -> dict[str, Any]:
    """Read `run.json`; what a crash left half written is put in order first.

    Raises:
        ValueError: If the folder holds no run, or `run.json` is damaged, or the folder is being written to.
    """
    manifest = read_manifest(folder)
    if (folder / STAGED).exists():
        with locked(folder):
            manifest = read_manifest(folder)
            Store(folder, manifest).recover(UNFINISHED)
    return manifest


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
        f"{folder} holds another run ({'; '.join(different)}); give another --output, and --fork {folder} to start it"
        " from the tasks that are finished here"
    )
