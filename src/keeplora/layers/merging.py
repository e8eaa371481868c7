"""How finished updates are merged into the weights, or laid beside them: measured, checked, never lost unseen."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from keeplora.errors import LearningError
from keeplora.layers.beside import add_beside
from keeplora.layers.lora import ADAPTER, LoraLinear, factors_of, lora_layers, reload, unload
from keeplora.layers.weights import dequantised, is_quantised, with_update
from keeplora.subspace.certificate import Change, change_of, loss_of

M = TypeVar("M", bound=nn.Module)

MERGE_ERROR_ALLOWED = 1e-3
"""How far a merged layer may be from the adapted one, beyond rounding, relative to what the update changes."""

MERGE_LOSS_ALLOWED = 0.05  # A merge that loses more of the update to the weights' precision has to be asked for.
LOSSES = 4  # How many times the measured loss of a merge is explained in the few outputs that are compared.
ROUNDINGS = 4  # How many roundings of each product that a layer adds up are explained.
NUM_PROBES = 8  # Random rows on which a merged layer is compared with the adapted one.


def changes_of(adapted: nn.Module, bases: dict[str, Tensor]) -> dict[str, Change]:
    """Return what a merge will change in each layer's weight, against the bases; nothing is merged yet.

    Raises:
        LearningError: If a weight would not be finite.
    """
    changes = {}
    for name, layer in lora_layers(adapted).items():
        update, merged = _merged_weight(name, layer)
        weight = layer.get_base_layer().weight.detach()
        changes[name] = change_of(weight, merged, update, bases.get(name), layer.r[ADAPTER])
    return changes


def _merged_weight(name: str, layer: LoraLinear) -> tuple[Tensor, Tensor]:
    """Return an update as PEFT would merge it, and the weight with it."""
    update = cast(Tensor, layer.get_delta_weight(ADAPTER)).detach()
    merged = with_update(layer.get_base_layer().weight, update)
    if not torch.isfinite(merged).all():
        raise LearningError(
            f"the trained update cannot be merged: layer {name!r} would hold NaN or infinity. Lower learning_rate"
        )
    return update, merged


def merge(adapted: nn.Module) -> nn.Module:
    """Add every update to its weight, rounded once, and return the plain base model; its weights must be finite."""
    for name, layer in lora_layers(adapted).items():
        layer.get_base_layer().weight.data.copy_(_merged_weight(name, layer)[1])
    return unload(adapted)


@dataclass(frozen=True)
class Merge:
    """What a merge did."""

    changes: dict[str, Change]
    """To the weight of each layer."""
    error: float
    """Of what the layers compute, relative to what the updates change in it."""

    @property
    def loss(self) -> float:
        """The part of the updates, over all layers, that the weights did not take up."""
        return loss_of(self.changes)


def merge_checked(
    adapted: nn.Module, task: str, bases: dict[str, Tensor], *, allow_loss: bool = False
) -> tuple[nn.Module, Merge]:
    """Merge every update, and compare on random inputs what each layer computes before and after.

    Returns the plain base model and what the merge did. Raised is, before anything is merged, that weights would not be
    finite, or that their precision would lose more of the updates than `MERGE_LOSS_ALLOWED`; and, after it, an error
    that neither rounding nor that loss explains.
    """
    changes = changes_of(adapted, bases)
    if (loss := loss_of(changes)) > MERGE_LOSS_ALLOWED and not allow_loss:
        worst = max(changes, key=lambda name: changes[name].merge_loss)
        dtype = lora_layers(adapted)[worst].get_base_layer().weight.dtype
        is_wide = torch.finfo(dtype).bits >= 32
        cure = "Let it stay beside the weights (updates = 'beside'), load the model in float32"
        raise LearningError(
            f"task {task!r}: merging would lose {loss:.0%} of the update ({changes[worst].merge_loss:.0%} in layer"
            f" {worst!r}): weights in {str(dtype).removeprefix('torch.')} are too coarse for so small a one; nothing"
            f" was merged. {'Raise learning_rate or epochs' if is_wide else cure}, or accept the"
            " loss with allow_merge_loss = True"
        )
    probes = {name: _Probe(layer, changes[name].merge_loss) for name, layer in lora_layers(adapted).items()}
    merged = merge(adapted)
    errors = [probe.error(name, merged.get_submodule(name), task) for name, probe in probes.items()]
    change = math.hypot(*(probe.change for probe in probes.values()))
    return merged, Merge(changes, math.hypot(*errors) / change if change > 0 else 0.0)


def lay_beside(adapted: nn.Module, task: str, bases: dict[str, Tensor]) -> tuple[nn.Module, Merge]:
    """Take the adapter out, and let its updates stay beside the weights, in float32; nothing of them is lost.

    Returned and raised is what `merge_checked` does.
    """
    updates, changes = factors_of(adapted), {}
    for name, (a, b) in updates.items():
        if not torch.isfinite(update := b @ a).all():
            raise LearningError(f"the trained update of layer {name!r} holds NaN or infinity. Lower learning_rate")
        changes[name] = change_of(torch.zeros_like(update), update, update, bases.get(name), len(a))
    probes = {name: _Probe(layer, 0.0) for name, layer in lora_layers(adapted).items()}
    model = put_beside(adapted)
    errors = [probe.error(name, model.get_submodule(name), task) for name, probe in probes.items()]
    change = math.hypot(*(probe.change for probe in probes.values()))
    return model, Merge(changes, math.hypot(*errors) / change if change > 0 else 0.0)


def put_beside(adapted: nn.Module) -> nn.Module:
    """Take the adapter out, and add every update beside its weight; return the plain base model."""
    updates = factors_of(adapted)
    model = unload(adapted)
    for name, (a, b) in updates.items():
        add_beside(model, name, a, b)
    return model


class _Probe:
    """Random rows, and what an adapted layer makes of them, with its update and without."""

    def __init__(self, layer: LoraLinear, loss: float) -> None:
        layer = _precise(layer)
        base = layer.get_base_layer()
        weight = dequantised(base) if is_quantised(base) else base.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.rows = torch.randn(NUM_PROBES, weight.shape[1], generator=generator).to(weight)
            self.adapted = layer(self.rows).double()
            self.change = float((self.adapted - layer.get_base_layer()(self.rows).double()).norm())
            sizes = self.rows.abs() @ weight.abs().T
            self.rounding = ROUNDINGS * torch.finfo(weight.dtype).eps * float(sizes.double().norm())
        self.rounding += LOSSES * loss * self.change

    def error(self, name: str, merged: nn.Module, task: str) -> float:
        """Return the error of the merged layer, or raise it if it is too large."""
        with torch.no_grad():
            error = float((_precise(merged)(self.rows).double() - self.adapted).norm())
        if not error <= MERGE_ERROR_ALLOWED * self.change + self.rounding:
            raise LearningError(
                f"task {task!r}: merging changed what layer {name!r} computes by {error:.3g}, where its update changes"
                f" {self.change:.3g} and rounding explains {self.rounding:.3g}; was it altered outside the adapter?"
            )
        return error


def _precise(layer: M) -> M:
    """Return a layer that computes in float32 at least: the rounding of its outputs would hide a small update."""
    is_whole = any(is_quantised(module) for module in layer.modules())  # Its numbers are what they are.
    is_wide = is_whole or all(torch.finfo(value.dtype).bits >= 32 for value in layer.parameters())
    return layer if is_wide else copy.deepcopy(layer).float()


def merge_from(model: nn.Module, folder: Path) -> nn.Module:
    """Reload a saved adapter into its base model, and merge it."""
    return merge(reload(model, folder))
