"""What the files of a run prove: every update measured anew, and the merged model made again from the base model.

Nothing is taken from the certificates that the run recorded; they are only compared with what is measured here.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.layers import lora
from keeplora.layers.module_state import device_of
from keeplora.methods.registry import Method, TaskRecord
from keeplora.subspace import protected as subspace
from keeplora.subspace.protected import LayerCertificate

ORTHONORMALITY_ALLOWED = 1e-4
"""A basis whose `max |basis^T basis - I|` is larger is not orthonormal (float32)."""

SAME_LEAK = 1e-5
"""Leaks that differ by no more are the same: below it is rounding, which another machine does differently."""

ROUNDINGS = 4
"""How many roundings to float32, of the largest entry of a weight, are allowed for each merge."""

UNREADABLE = (
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
        except UNREADABLE as error:
            self.breaches.append(f"task {name!r} cannot be checked: {type(error).__name__}: {error}")
            return None
        if misfits:
            self.breaches += [f"task {name!r}: {misfit}" for misfit in misfits]
            return None
        found = breaches_of(measured, self.method.leak_allowed) + contradictions(recorded, measured)
        self.breaches += [f"task {name!r}: {text}" for text in found]
        return measured

    def _take(self, name: str, record: TaskRecord, folder: Path) -> tuple[dict[str, LayerCertificate], list[str]]:
        before, device = self.method.protected(self.model), device_of(self.model)
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
            self.method.add_task(record)
        return subspace.certificates(before, self.method.protected(self.model), updates), []

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
    now: dict[str, Any] = subspace.certificate_to_json(measured)
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
