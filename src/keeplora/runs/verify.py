"""Whether a run directory is what it claims to be: its files unchanged, its certificates and its model reproducible.

Everything is computed anew from the files and the base model. What no file can tell is taken as it is: the scores, the
times, and whether the recorded directions are the ones that a task's data calls for.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from keeplora.evaluation.capacity import Capacity, capacity_of
from keeplora.methods.registry import find_method
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import Store
from keeplora.runs.directory import RunDirectory, task_folder
from keeplora.runs.loop import require_same_model
from keeplora.runs.open import settled_manifest
from keeplora.runs.recompute import UNREADABLE, Replay
from keeplora.runs.reopen import config_of
from keeplora.subspace.protected import LayerCertificate, certificate_to_json
from keeplora.training.trainer import best_device


@dataclass(frozen=True)
class TaskProof:
    """What was measured of one finished task."""

    name: str
    layers: dict[str, LayerCertificate] = field(default_factory=dict)
    """Measured anew, by layer; empty if the method protects nothing."""
    is_checked: bool = True
    """Whether it could be measured; not if its files, or those of an earlier task, are damaged."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the form of the certificate in `task.json`."""
        return {"name": self.name, "is_checked": self.is_checked, **certificate_to_json(self.layers)}


@dataclass
class Proof:
    """What was checked of a run, and every breach that was found."""

    folder: Path
    method: str
    num_files: int
    tasks: list[TaskProof] = field(default_factory=list)
    leak_allowed: float = 1.0
    merge_error: float | None = None
    """Largest difference of a parameter from base model and updates; None if it could not be, or was not, checked."""
    notes: list[str] = field(default_factory=list)
    """What was not checked, and why, where that is no breach."""
    breaches: list[str] = field(default_factory=list)

    @property
    def protects(self) -> bool:
        """Whether something is protected, so that there are certificates."""
        return any(task.layers for task in self.tasks)

    @property
    def capacity(self) -> Capacity | None:
        """The room that the checked tasks have left, by the measured certificates."""
        return capacity_of([{"name": task.name, "certificate": task.to_json()} for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        """Return plain values: what `--json` writes; what is no finite number is null."""
        return dict(
            _finite(
                {
                    "run": str(self.folder),
                    "method": self.method,
                    "is_sound": not self.breaches,
                    "breaches": self.breaches,
                    "notes": self.notes,
                    "num_files": self.num_files,
                    "leak_allowed": self.leak_allowed,
                    "merge_error": self.merge_error,
                    "tasks": [task.to_json() for task in self.tasks],
                }
            )
        )


def certify(folder: Path, *, track: Track = silent) -> Proof:
    """Check a run directory against its own files and the base model that it names; the run itself is not changed.

    Args:
        folder: The run directory; of a run that is not complete, the finished tasks are checked.
        track: Shows progress over the files and the tasks.

    Raises:
        ValueError: If the folder holds no run, or `run.json` itself is damaged.
    """
    manifest = settled_manifest(folder)
    proof = Proof(folder=folder, method=str(manifest["config"].get("method")), num_files=len(manifest["files"]))
    damage = Store(folder, manifest).damaged(track)
    proof.breaches += damage
    proof.breaches += _strangers(manifest, folder)
    num_finished = int(manifest["tasks_finished"])
    if num_finished == 0:
        proof.notes.append("no task is finished: only the files' hashes were checked")
        return proof
    unlisted = [name for name in _task_files(manifest) if name not in manifest["files"]]
    proof.breaches += [f"{folder / name} is not listed in run.json, though its task is finished" for name in unlisted]
    num_readable = _num_readable(manifest, [*damage, *unlisted])
    try:
        _replay(
            proof,
            RunDirectory(folder, manifest | {"tasks_finished": num_readable}),
            num_readable == num_finished,
            track,
        )
    except UNREADABLE as error:
        proof.breaches.append(f"not everything can be checked: {error}")
    names = manifest["tasks"][len(proof.tasks) : num_finished]
    proof.tasks += [TaskProof(name, is_checked=False) for name in names]
    return proof


def _strangers(manifest: dict[str, Any], folder: Path) -> list[str]:
    """Return a message for every file beside the run's own."""
    there = (path for part in ("tasks", "model") for path in sorted((folder / part).rglob("*")) if path.is_file())
    return [
        f"{path} is not of this run" for path in there if path.relative_to(folder).as_posix() not in manifest["files"]
    ]


def _num_readable(manifest: dict[str, Any], damage: Iterable[str]) -> int:
    """Count the finished tasks before the first one that has a damaged file."""
    files = _task_files(manifest)
    for index, name in enumerate(files):
        if any(name.removesuffix("task.json") in message for message in damage):
            return index
    return len(files)


def _task_files(manifest: dict[str, Any]) -> list[str]:
    """Return the name of the `task.json` of every finished task."""
    return [f"{task_folder(index, manifest['tasks'])}/task.json" for index in range(int(manifest["tasks_finished"]))]


def _replay(proof: Proof, directory: RunDirectory, has_all: bool, track: Track) -> None:
    """Measure the readable tasks one by one, then compare the models."""
    config = config_of(directory)
    base = family_of(config.model).load(locate(config.model)).to(best_device())
    require_same_model(base, config, directory)
    replay = Replay(base, find_method(config.method)[0](config.options, seed=config.seed, track=track))
    proof.leak_allowed = replay.method.leak_allowed
    for index in track(range(directory.num_finished), "replaying tasks", directory.num_finished):
        name = directory.manifest["tasks"][index]
        recorded = directory.tasks[index].get("certificate")
        if (called := directory.tasks[index].get("name")) != name:
            proof.breaches.append(f"task {name!r}: its task.json is that of {called!r}")
        if (layers := replay.take(name, recorded, partial(directory.record, index))) is None:
            has_all = False
            break
        proof.tasks.append(TaskProof(name, layers))
    proof.breaches += replay.breaches
    if not has_all:
        proof.notes.append("the merged model was not compared: not every task can be replayed")
    elif not config.save_model:
        proof.notes.append("the run has no merged model (save_model = False): there is none to compare")
    else:
        _compare_models(proof, replay, directory)


def _compare_models(proof: Proof, replay: Replay, directory: RunDirectory) -> None:
    folder = proof.folder / "model"
    if any(message.startswith(f"{folder}/") for message in proof.breaches):
        proof.notes.append("the merged model was not compared: its files are not those of the run")
    elif not any(name.startswith("model/") for name in directory.manifest["files"]):
        proof.breaches.append(f"{folder} is missing from the run, which was to save its model")
    else:
        num_before = len(replay.breaches)
        saved = family_of(str(folder)).load(str(folder))
        proof.merge_error = replay.merge_error(saved)
        proof.breaches += replay.breaches[num_before:]


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
