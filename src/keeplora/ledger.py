"""The run directory: what was configured, what each task left behind, the scores, the merged model.

Safetensors and JSON only. Every file is written under a temporary name and renamed, and `run.json` holds the SHA-256
of each, so that a reader never sees half a file and a damaged one is noticed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save

from keeplora.adapter import CONFIG_FILE, WEIGHTS_FILE, SavedAdapter
from keeplora.manifest import locked, open_manifest, write_atomically
from keeplora.measure import Phases
from keeplora.methods import TaskRecord
from keeplora.results import Results
from keeplora.subspace import certificate_to_json


class Ledger:
    """Reads and writes one run directory. Make one with `open_ledger`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
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
            benchmark=config["benchmark"],
            model=config["model"],
            seed=config["seed"],
            tasks=self.manifest["tasks"],
            zero_shot=self.manifest["zero_shot"],
            accuracy=[task["scores"] for task in self.tasks],
            seconds=seconds,
            peak_memory_mb=max((m["peak_memory_mb"] for phase in phases for m in phase.values()), default=0.0),
        )

    def start(self, zero_shot: list[float], phases: Phases) -> None:
        """Record the scores of the untouched model."""
        self.manifest |= {"zero_shot": zero_shot, "start": phases}
        self.write_manifest()

    def add_task(self, record: TaskRecord, details: dict[str, Any], save_model: Callable[[Path], None] | None) -> None:
        """Record the next task: its adapter, directions, head, certificate, scores and times; and the merged model.

        Args:
            record: What the method left behind.
            details: What else `task.json` holds: `scores`, `phases`, `losses`.
            save_model: Writes the merged model to a folder; None if it is the one that is there.
        """
        folder = self._task_folder(self.num_finished)
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
        details = {**details, "certificate": certificate, "merged": record.merged}
        self.write_json(f"{folder}/task.json", details)
        if save_model is not None:
            self._replace_model(save_model)
        self.tasks.append(details)
        self.manifest["tasks_finished"] += 1
        self.manifest["phase"] = "complete" if self.is_complete else "running"
        self.write_json("metrics.json", self.results().to_json())
        self.write_manifest()

    def record(self, index: int) -> tuple[TaskRecord, Path]:
        """Read back what a finished task left, and the folder of its adapter.

        Raises:
            ValueError: If a file is missing or damaged; the message names it.
        """
        folder = self._task_folder(index)
        adapter = self.folder / folder / "adapter"
        saved = None
        if f"{folder}/adapter/{WEIGHTS_FILE}" in self.manifest["files"]:
            config = SavedAdapter.config_from(self.read(f"{folder}/adapter/{CONFIG_FILE}"))
            saved = SavedAdapter(config, self._tensors(f"{folder}/adapter/{WEIGHTS_FILE}"))
        return TaskRecord(
            adapter=saved,
            directions=self._tensors(f"{folder}/subspace.safetensors"),
            head=self._tensors(f"{folder}/head.safetensors"),
            state=self._tensors(f"{folder}/state.safetensors"),
            merged=self.tasks[index].get("merged", True),
        ), adapter

    def require_intact_model(self) -> None:
        """Check the merged model's files against their hashes.

        Raises:
            ValueError: If one is missing or damaged; the message names it.
        """
        for name in self.manifest["files"]:
            if name.startswith("model/"):
                self.read(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a file under a temporary name, rename it, and remember its hash."""
        if not _is_main_process():
            return
        write_atomically(self.folder / name, content)
        self.manifest["files"][name] = hashlib.sha256(content).hexdigest()

    def write_json(self, name: str, value: object) -> None:
        """Write a value as JSON."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def read(self, name: str) -> bytes:
        """Read a file of the run and check its hash.

        Raises:
            ValueError: If it is missing or damaged.
        """
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the run")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"].get(name):
            raise ValueError(f"{path} is not what the run wrote: it was changed or damaged")
        return content

    def _tensors(self, name: str) -> dict[str, Any]:
        if name not in self.manifest["files"]:
            return {}
        try:
            return load(self.read(name))
        except SafetensorError as error:
            raise ValueError(f"{self.folder / name} is not a safetensors file: {error}") from None

    def _task_json(self, index: int) -> dict[str, Any]:
        return dict(json.loads(self.read(f"{self._task_folder(index)}/task.json")))

    def _task_folder(self, index: int) -> str:
        return f"tasks/{index + 1:02d}-{self.manifest['tasks'][index]}"

    def _replace_model(self, save_model: Callable[[Path], None]) -> None:
        if not _is_main_process():
            return
        final, part, old = (self.folder / name for name in ("model", "model.part", "model.old"))
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        save_model(part)
        if final.exists():
            final.rename(old)
        part.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        self.manifest["files"] = {
            name: h for name, h in self.manifest["files"].items() if not name.startswith("model/")
        }
        files = {f"model/{path.relative_to(final).as_posix()}": path for path in final.rglob("*") if path.is_file()}
        for name, path in files.items():
            self.manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def write_manifest(self) -> None:
        """Write `run.json`; what it does not list has not happened."""
        if _is_main_process():
            write_atomically(self.folder / "run.json", (json.dumps(self.manifest, indent=1) + "\n").encode())


@contextmanager
def open_ledger(folder: Path, config: dict[str, Any], tasks: list[str]) -> Iterator[Ledger]:
    """Open a run directory for writing: a new one, or one of the same configuration to go on with.

    Raises:
        ValueError: If the folder belongs to another run or is no run, or another process is writing to it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give another --output")
    ours = {"run.json", "run.json.part", "lock"}
    if folder.exists() and not (folder / "run.json").exists() and {path.name for path in folder.iterdir()} - ours:
        raise ValueError(f"{folder} is not empty and holds no run; give another --output, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if _is_main_process() else nullcontext():
        ledger = Ledger(folder, open_manifest(folder, config, tasks))
        ledger.write_manifest()
        yield ledger


def _is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
