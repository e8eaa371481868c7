"""Whether a run directory is what it claims to be: its files unchanged, its certificates and its model reproducible.

Everything is computed anew from the files and the base model. What no file can tell is taken as it is: the scores, the
times, and whether the recorded directions are the ones that a task's data calls for.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.evaluation.capacity import Capacity, capacity_of
from keeplora.layers import lora
from keeplora.layers.module_state import device_of
from keeplora.methods.base import Method, TaskRecord
from keeplora.methods.registry import find_method
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import Store
from keeplora.runs.directory import RunDirectory, task_folder
from keeplora.runs.loop import require_same_model
from keeplora.runs.open import config_of, settled_manifest
from keeplora.subspace.certificate import LayerCertificate, certificate_to_json, certificates
from keeplora.training.trainer import best_device

ORTHONORMALITY_ALLOWED = 1e-4
"""A basis whose `max |basis^T basis - I|` is larger is not orthonormal (float32)."""

SAME_LEAK = 1e-5
"""Leaks that differ by no more are the same: below it is rounding, which another machine does differently."""

ROUNDINGS = 4
"""How many roundings to float32, of the largest entry of a weight, are allowed for each merge."""

UNREPLAYABLE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError
)  # fmt: skip
"""What reading or replaying a file can raise whose hash is right and whose content is not what a run writes."""

Weights = dict[str, Tensor]


@dataclass
class Replay:
    """A base model that learns the finished tasks again from their records, and what was found on the way."""

    model: nn.Module
    method: Method
    breaches: list[str] = field(default_factory=list)
    num_merged: int = 0
    adapted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.original = copied(self.model.state_dict())
        self.method.protect(self.model)

    def take(
        self, name: str, recorded: object, read: Callable[[], tuple[TaskRecord, Path]]
    ) -> dict[str, LayerCertificate] | None:
        """Measure the next task's update, merge it, and take up its directions.

        Args:
            name: The task.
            recorded: The certificate in its `task.json`, a dictionary if it is as a run writes it.
            read: Returns what the task recorded, and the folder of its adapter.

        Returns:
            What was measured of each layer, empty if nothing is protected; None if the task cannot be measured.
        """
        try:
            record, folder = read()
            measured, misfits = self._take(name, record, folder)
        except UNREPLAYABLE as error:
            self.breaches.append(f"task {name!r} cannot be checked: {type(error).__name__}: {error}")
            return None
        if misfits:
            self.breaches += [f"task {name!r}: {misfit}" for misfit in misfits]
            return None
        found = breaches_of(measured, self.method.leak_allowed) + contradictions(recorded, measured)
        self.breaches += [f"task {name!r}: {text}" for text in found]
        return measured

    def _take(self, name: str, record: TaskRecord, folder: Path) -> tuple[dict[str, LayerCertificate], list[str]]:
        before, device = self.method.protected(), device_of(self.model)
        factors = {} if record.adapter is None else record.adapter.factors()
        updates = {layer: (a.to(device), b.to(device)) for layer, (a, b) in factors.items()}
        if misfits := self._misfits(updates, record.directions, before):
            return {}, misfits
        if record.merged and record.adapter is not None:
            weights = copied(self._weights(list(updates)))
            self.model = self.method.replay(self.model, record, folder)
            self.num_merged += 1
            self.adapted |= set(updates)
            self.breaches += [
                f"task {name!r}: {text}" for text in _unlike(weights, self._weights(list(weights)), updates)
            ]
        elif record.merged:
            self.method.keep(record)
        return certificates(before, self.method.protected(), updates), []

    def _misfits(self, updates: dict[str, tuple[Tensor, Tensor]], directions: Weights, bases: Weights) -> list[str]:
        """Say what is wrong with the form of a task's files, so that nothing of them can be measured."""
        targets = self._weights(lora.linear_targets(self.model, self.method.config.targets)) if updates else {}
        found = [f"its adapter changes {layer}, which is no target" for layer in updates if layer not in targets]
        for layer, (a, b) in updates.items():
            if layer in targets and (b.shape[0], a.shape[1]) != targets[layer].shape:
                found.append(f"its adapter does not fit the weight of {layer}")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                found.append(f"its adapter is not finite in {layer}")
        if bases and directions.keys() != bases.keys():
            found.append(f"its directions are of {len(directions)} layers, {len(bases)} are protected")
        for layer in bases.keys() & directions.keys():
            added = directions[layer]
            if added.dim() != 2 or len(added) != len(bases[layer]) or not torch.isfinite(added).all():
                found.append(f"its directions do not fit {layer}, or are not finite")
        return found

    def merge_error(self, saved: nn.Module) -> float:
        """Compare a run's merged model with the replayed one, and what no task changes with the base model.

        Returns:
            The largest absolute difference of any parameter from the replayed one.
        """
        replayed, found = self.model.state_dict(), saved.to(device_of(self.model)).state_dict()
        if different := sorted(replayed.keys() ^ found.keys()):
            self.breaches.append(f"model/: {len(different)} parameters are missing or too many, {different[0]} first")
        shared = [name for name in replayed if name in found]
        if shapes := [name for name in shared if replayed[name].shape != found[name].shape]:
            self.breaches.append(f"model/: {len(shapes)} parameters have another shape, {shapes[0]} first")
            return float("inf")
        errors = {name: largest_difference(replayed[name], found[name]) for name in shared}
        allowed = {name: self._rounding(replayed[name]) for name in shared}
        may_change = {f"{layer}.weight" for layer in self.adapted}
        still = [name for name in shared if name not in may_change]
        touched = [name for name in still if not torch.equal(found[name], self.original[name])]
        if touched:
            self.breaches.append(
                f"model/: {len(touched)} parameters that no task changes are not the base model's, {touched[0]} first"
            )
        wrong = [name for name in shared if name not in touched and not errors[name] <= allowed[name]]
        if wrong:
            worst = max(wrong, key=lambda name: errors[name])
            self.breaches.append(
                f"model/: {len(wrong)} weights are not the base model's with all updates; {worst} differs by"
                f" {errors[worst]:.2g}"
            )
        return max(errors.values(), default=0.0)

    def _rounding(self, weight: Tensor) -> float:
        return ROUNDINGS * max(1, self.num_merged) * _eps(weight)

    def _weights(self, layers: list[str]) -> Weights:
        return {layer: self.model.get_parameter(f"{layer}.weight").detach() for layer in layers}


def breaches_of(measured: dict[str, LayerCertificate], leak_allowed: float) -> list[str]:
    """Say which layers leak or have a basis that is not orthonormal."""
    found = []
    for key, allowed, what in (
        ("leak", leak_allowed, "leak into what was protected"),
        ("orthonormality", ORTHONORMALITY_ALLOWED, "have a basis that is not orthonormal"),
    ):
        values = {name: getattr(layer, key) for name, layer in measured.items()}
        wrong = [name for name, value in values.items() if not value <= allowed]
        if wrong:
            worst = max(wrong, key=lambda name: values[name])
            found.append(
                f"{len(wrong)} of {len(values)} layers {what}: {worst} by {values[worst]:.2g}, {allowed:g} is allowed"
            )
    return found


def contradictions(recorded: object, measured: dict[str, LayerCertificate]) -> list[str]:
    """Say where a recorded certificate differs from what was measured."""
    now: dict[str, Any] = certificate_to_json(measured)
    before = recorded if isinstance(recorded, dict) else {}
    layers, worst = before.get("layers", {}), before.get("worst", {})
    if not isinstance(layers, dict) or layers.keys() != measured.keys():
        return [f"the recorded certificate is of other layers than the {len(measured)} of the files"]
    pairs = {name: (layers[name], asdict(layer)) for name, layer in measured.items()}
    if measured:
        pairs["the worst layer"] = (worst, now["worst"])
    found = [
        f"{place}: the recorded {key} is {_shown(said, key)}, the files give {value:.4g}"
        for place, (said, values) in pairs.items()
        for key, value in values.items()
        if not _agree(said, key, value)
    ]
    more = f" ({len(found) - 1} more differ)" if len(found) > 1 else ""
    return [found[0] + more] if found else []


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape; not a number if an entry is none."""
    return float((first.double() - second.double()).abs().max()) if first.numel() else 0.0


def copied(tensors: Weights) -> Weights:
    """Return copies that later changes do not reach."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _agree(recorded: object, key: str, value: float) -> bool:
    allowed = {"leak": SAME_LEAK, "orthonormality": ORTHONORMALITY_ALLOWED}.get(key, 0)
    found = recorded.get(key) if isinstance(recorded, dict) else None
    return isinstance(found, int | float) and abs(found - value) <= allowed


def _shown(recorded: object, key: str) -> str:
    found = recorded.get(key) if isinstance(recorded, dict) else None
    return f"{found:.4g}" if isinstance(found, int | float) else "missing"


def _eps(weight: Tensor) -> float:
    """Return the rounding of the largest entry of a weight."""
    return torch.finfo(torch.float32).eps * (float(weight.abs().max()) if weight.numel() else 0.0)


def _unlike(before: Weights, after: Weights, updates: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Say where a merge changed a weight by something else than the update that was measured."""
    found = []
    for layer, weight in before.items():
        a, b = updates[layer]
        rounding = ROUNDINGS * max(_eps(weight), _eps(after[layer])) + a.shape[0] * _eps(b.abs() @ a.abs())
        error = largest_difference(after[layer] - weight, b @ a)
        if not error <= rounding:
            found.append(f"{layer}: the adapter's settings make another update of it than its factors, by {error:.2g}")
    return found


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
    except UNREPLAYABLE as error:
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
