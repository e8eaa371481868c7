"""Whether a run directory is what it claims to be: its files unchanged, its certificates and its model reproducible.

All is computed anew but for what no file can tell: scores, times, and whether the directions are those of the data.
"""

import json
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.evaluation.capacity import Capacity, capacity_of
from keeplora.layers import lora, weights
from keeplora.layers.lora import A_KEY, B_KEY, PREFIX
from keeplora.layers.module_state import device_of
from keeplora.methods.base import Method, TaskRecord
from keeplora.methods.registry import find_method
from keeplora.models.registry import family_of, locate
from keeplora.progress import Track, silent
from keeplora.runs.atomic_store import Store
from keeplora.runs.directory import RunDirectory, task_folder
from keeplora.runs.loop import require_same_model
from keeplora.runs.open import config_of, settled_manifest
from keeplora.subspace.certificate import Change, LayerCertificate, certificate_to_json, certificates, change_of
from keeplora.training.trainer import best_device

ORTHONORMALITY_ALLOWED = 1e-4  # A basis whose `max |basis^T basis - I|` is larger is not orthonormal (float32).

SAME = {"leak": 1e-5, "merge_loss": 1e-5, "orthonormality": ORTHONORMALITY_ALLOWED}
"""Measured values that differ by no more are the same: below it is rounding, which another machine does differently. So
is what a merge lost of an update, and what that adds to the leak."""

ROUNDINGS = 4  # How many roundings to float32, of the largest entry of a weight, are allowed for each merge.

UNREPLAYABLE = (ValueError, OSError, LookupError, RuntimeError)
"""What reading or replaying a file can raise whose hash is right and whose content is not what a run writes."""

Updates = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TaskProof:
    """What was measured of one finished task."""

    name: str
    layers: dict[str, LayerCertificate] = field(default_factory=dict)
    """Measured anew, by layer; empty if the method protects nothing."""
    is_checked: bool = True  # Whether it could be measured; not if its files, or those of an earlier task, are damaged.

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
    notes: list[str] = field(default_factory=list)  # What was not checked, and why, where that is no breach.
    breaches: list[str] = field(default_factory=list)

    @property
    def protects(self) -> bool:
        """Whether something is protected, so that there are certificates."""
        return any(task.layers for task in self.tasks)

    @property
    def capacity(self) -> Capacity | None:
        """The capacity that the checked tasks have left, by the measured certificates."""
        return capacity_of([{"name": task.name, "certificate": task.to_json()} for task in self.tasks])

    def to_json(self) -> dict[str, Any]:
        """Return plain values: what `--json` writes; what is no finite number is null."""
        values = {"run": str(self.folder), "method": self.method, "is_sound": not self.breaches}
        for key in ("breaches", "notes", "num_files", "leak_allowed", "merge_error"):
            values[key] = getattr(self, key)
        values["tasks"] = [task.to_json() for task in self.tasks]
        return dict(json.loads(json.dumps(values), parse_constant=lambda name: None))


def certify(folder: Path, *, track: Track = silent) -> Proof:
    """Check a run's finished tasks against its files and base model; ValueError: `run.json` itself is damaged."""
    manifest = settled_manifest(folder)
    files, finished = manifest["files"], manifest["tasks"][: manifest["tasks_finished"]]
    proof = Proof(folder=folder, method=str(manifest["config"].get("method")), num_files=len(files))
    store = Store(folder, manifest)
    damage = store.damaged(track(files, "checking hashes", len(files)))
    proof.breaches += damage + [f"{path} is not of this run" for path in store.strangers()]
    if not finished:
        if files:
            proof.notes.append("only the files' hashes were checked")
        return proof
    folders = [f"{task_folder(index, manifest['tasks'])}/" for index in range(len(finished))]
    unlisted = [f"{place}task.json" for place in folders if f"{place}task.json" not in files]
    proof.breaches += [f"{folder / name} is not listed in run.json, though its task is finished" for name in unlisted]
    damage += unlisted
    readable = list(takewhile(lambda place: not any(place in message for message in damage), folders))
    try:
        _replay(proof, RunDirectory(folder, manifest | {"tasks_finished": len(readable)}), finished, track)
    except torch.OutOfMemoryError:  # Says nothing of the run.
        raise
    except UNREPLAYABLE as error:
        proof.breaches.append(f"not everything can be checked: {error}")
    proof.tasks += [TaskProof(name, is_checked=False) for name in finished[len(proof.tasks) :]]
    return proof


def _replay(proof: Proof, directory: RunDirectory, finished: list[str], track: Track) -> None:
    """Measure the tasks one by one as far as they are readable, then compare the models."""
    config = config_of(directory)
    base = family_of(config.model).load(locate(config.model), config.precision).to(best_device())
    require_same_model(base, config, directory)
    method = find_method(config.method)[0](config.options, seed=config.seed, track=track)
    replay = _Replay(base, method, proof)
    proof.leak_allowed = method.leak_allowed
    for index in track(range(directory.num_finished), "replaying tasks", directory.num_finished):
        details = directory.tasks[index]
        if details["name"] != finished[index]:
            proof.breaches.append(f"task {finished[index]!r}: its task.json is that of {details['name']!r}")
        replay.take(finished[index], directory, index)
        if len(proof.tasks) == index:
            break
    place = proof.folder / "model"
    if len(proof.tasks) < len(finished):
        proof.notes.append("the merged model was not compared: not every task can be replayed")
    elif not config.save_model or config.keeps_beside:
        reason = "save_model = False" if not config.save_model else "updates stay beside the weights"
        proof.notes.append(f"the run has no merged model ({reason}): there is none to compare")
    elif any(message.startswith(f"{place}/") for message in proof.breaches):
        proof.notes.append("the merged model was not compared: its files are not those of the run")
    elif not any(name.startswith("model/") for name in directory.files):
        proof.breaches.append(f"{place} is missing from the run, which was to save its model")
    else:
        replay.compare(family_of(str(place)).load(str(place), config.precision))


class _Replay:
    """A base model that learns the finished tasks again from their records; what is found goes into the proof."""

    def __init__(self, model: nn.Module, method: Method, proof: Proof) -> None:
        self.model = model
        self.method = method
        self.proof = proof
        self.num_merged = 0
        self.adapted: set[str] = set()
        self.original = {name: value.detach().clone() for name, value in model.state_dict().items()}
        method.protect(model)

    def take(self, name: str, directory: RunDirectory, index: int) -> None:
        """Measure the next task's update, merge it, and take up its directions; add its proof if that can be done."""
        try:
            record, folder = directory.record(index)
            updates, before = updates_of(record, device_of(self.model)), self.method.protected()
            if misfits := self._misfits(updates, record.directions, before):
                self.proof.breaches += [f"task {name!r}: {misfit}" for misfit in misfits]
                return
            self.proof.breaches += [f"task {name!r}: {flaw}" for flaw in self._flaws(record, directory, index)]
            found, changes = self._merge(record, folder, updates, before)
            layers = certificates(self.method.protected(), changes)
            found += breaches_of(layers, self.method.leak_allowed)
            found += contradictions(directory.tasks[index]["certificate"], layers)
        except torch.OutOfMemoryError:
            raise
        except UNREPLAYABLE as error:
            self.proof.breaches.append(f"task {name!r} cannot be checked: {type(error).__name__}: {error}")
            return
        self.proof.breaches += [f"task {name!r}: {text}" for text in found]
        self.proof.tasks.append(TaskProof(name, layers))

    def _flaws(self, record: TaskRecord, directory: RunDirectory, index: int) -> list[str]:
        """Say what of a task's tensors is not what its task.json was written for, or cannot be."""
        details, found = directory.tasks[index], []
        if details["digest"] != record.whole_digest():
            found.append("its files hold other tensors than those that its task.json was written for")
        known = {PREFIX + layer + key for layer in record.factors() for key in (A_KEY, B_KEY)}
        if record.adapter is not None and (extra := sorted(record.adapter.weights.keys() - known)):
            found.append(f"its adapter holds {extra[0]!r}, which is no factor")
        head, classes = record.head, directory.manifest.get("data", {}).get(details["name"], {}).get("classes")
        if (getattr(self.method.config, "classifier", "none") != "none") != bool(head):
            found.append(f"it has {'a' if head else 'no'} classifier, against the run's settings")
        elif head and (head.keys() != {"weight"} or not torch.isfinite(head["weight"]).all()):
            found.append("its classifier is not one finite weight")
        elif head and classes is not None and head["weight"].shape[:-1] != (len(classes),):
            found.append(f"its classifier has the shape {tuple(head['weight'].shape)} for {len(classes)} classes")
        return found

    def _misfits(self, updates: Updates, directions: dict[str, Tensor], bases: dict[str, Tensor]) -> list[str]:
        """Say what is wrong with the form of a task's files, so that nothing of them can be measured."""
        config = self.method.config
        targets = lora.linear_targets(self.model, config.targets, config.towers) if updates else []
        found = [f"its adapter changes {layer}, which is no target" for layer in updates if layer not in targets]
        for layer, (a, b) in updates.items():
            if layer in targets and (b.shape[0], a.shape[1]) != weights.shape_of(self.model, layer):
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

    def _merge(
        self, record: TaskRecord, folder: Path, updates: Updates, bases: dict[str, Tensor]
    ) -> tuple[list[str], dict[str, Change]]:
        """Redo a task; say where the merge added something else than its update, and what it changed in the weights."""
        if not record.merged:
            return [], {}
        before = {layer: self.method.learned_weight(self.model, layer).clone() for layer in updates}
        self.model = self.method.replay(self.model, record, folder)
        self.num_merged += bool(updates)
        self.adapted |= updates.keys()
        found = []
        for layer, (a, b) in updates.items():
            after = self.method.learned_weight(self.model, layer)
            rounding = ROUNDINGS * max(_eps(before[layer]), _eps(after)) + a.shape[0] * _eps(b.abs() @ a.abs())
            error = _largest_difference(after - before[layer], b @ a)
            if not error <= rounding:
                text = "the adapter's settings make another update of it than its factors"
                found.append(f"{layer}: {text}, by {error:.2g}")
        return found, changes_between(before, self.method, self.model, updates, bases)

    def compare(self, saved: nn.Module) -> None:
        """Compare a run's merged model with the replayed one, and what no task changes with the base model."""
        replayed, found = self.model.state_dict(), saved.to(device_of(self.model)).state_dict()
        shared = [name for name in replayed if name in found]
        misshapen = [name for name in shared if replayed[name].shape != found[name].shape]
        compared = [] if misshapen else shared
        errors = {name: _largest_difference(replayed[name], found[name]) for name in compared}
        merged = [name for name in compared if name.removesuffix(".weight") in self.adapted]
        still = [name for name in compared if name not in merged]
        touched = [name for name in still if not torch.equal(found[name], self.original[name])]
        for names, what in (
            (sorted(replayed.keys() ^ found.keys()), "parameters are missing or too many"),
            (misshapen, "parameters have another shape"),
            (touched, "parameters that no task changes are not the base model's"),
        ):
            if names:
                self.proof.breaches.append(f"model/: {len(names)} {what}, {names[0]} first")
        roundings = ROUNDINGS * max(1, self.num_merged)
        if wrong := [name for name in merged if not errors[name] <= roundings * _eps(replayed[name])]:
            worst = max(wrong, key=lambda name: errors[name])
            text = f"weights are not the base model's with all updates; {worst} differs by {errors[worst]:.2g}"
            self.proof.breaches.append(f"model/: {len(wrong)} {text}")
        self.proof.merge_error = float("inf") if misshapen else max(errors.values(), default=0.0)


def updates_of(record: TaskRecord, device: torch.device) -> Updates:
    """Return the factors `(a, scaling * b)` of every layer that a task adapted, on a device."""
    return {layer: (a.to(device), b.to(device)) for layer, (a, b) in record.factors().items()}


def changes_between(
    before: dict[str, Tensor], method: Method, model: nn.Module, updates: Updates, bases: dict[str, Tensor]
) -> dict[str, Change]:
    """Return what a task changed in the layers that it adapted, against bases."""
    return {
        layer: change_of(before[layer], method.learned_weight(model, layer), b @ a, bases.get(layer), len(a))
        for layer, (a, b) in updates.items()
    }


def breaches_of(measured: dict[str, LayerCertificate], leak_allowed: float) -> list[str]:
    """Say which layers leak, beyond what rounding lost of the update, or have a basis that is not orthonormal."""
    found = []
    leaks = {name: max(layer.leak - layer.merge_loss, 0.0) for name, layer in measured.items()}
    errors = {name: layer.orthonormality for name, layer in measured.items()}
    for values, allowed, what in (
        (leaks, leak_allowed, "leak into what was protected"),
        (errors, ORTHONORMALITY_ALLOWED, "have a basis that is not orthonormal"),
    ):
        if wrong := [name for name, value in values.items() if not value <= allowed]:
            worst = max(wrong, key=lambda name: values[name])
            text = f"{len(wrong)} of {len(values)} layers {what}: {worst} by {values[worst]:.2g}"
            found.append(f"{text}, {allowed:g} is allowed")
    return found


def contradictions(recorded: object, measured: dict[str, LayerCertificate]) -> list[str]:
    """Say where a recorded certificate, a dictionary if it is as a run writes it, differs from what was measured."""
    now: dict[str, Any] = certificate_to_json(measured)
    before = recorded if isinstance(recorded, dict) else {}
    layers = before.get("layers", {})
    if not isinstance(layers, dict) or layers.keys() != measured.keys():
        return [f"the recorded certificate is of other layers than the {len(measured)} of the files"]
    said = {**layers, "the worst layer": before.get("worst")}
    found = []
    for place, values in {**now.get("layers", {}), "the worst layer": now.get("worst", {})}.items():
        for key, value in values.items():
            old = said[place].get(key) if isinstance(said[place], dict) else None
            is_number = isinstance(old, int | float)
            same = SAME.get(key, 0) + (values["merge_loss"] if key in ("leak", "merge_loss") else 0)
            if not is_number or not abs(old - value) <= same:
                shown = f"{old:.4g}" if is_number else "missing"
                found.append(f"{place}: the recorded {key} is {shown}, the files give {value:.4g}")
    more = f" ({len(found) - 1} more differ)" if len(found) > 1 else ""
    return [found[0] + more] if found else []


def _largest_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape; not a number if an entry is none."""
    return float((first.double() - second.double()).abs().max()) if first.numel() else 0.0


def _eps(weight: Tensor) -> float:
    """Return the rounding of the largest entry of a weight."""
    return torch.finfo(torch.float32).eps * (float(weight.abs().max()) if weight.numel() else 0.0)
