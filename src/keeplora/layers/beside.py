"""Finished updates that stay beside the weights, where these are too coarse to take them up: half precision, or 4 bits.

What a layer has learned so far is one LoRA `(a [R, d_in], b [d_out, R])`, in float32 whatever the weights are, that a
hook adds to what the layer computes. Names, weights and inputs of the layers stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]


class _Updates:
    """The hook of one layer: its updates, in the order in which they came."""

    def __init__(self) -> None:
        self.blocks: list[Factors] = []
        self._stacked: Factors | None = None

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        a, b = self._on(output.device)
        with torch.autocast(output.device.type, enabled=False):
            return output + F.linear(F.linear(inputs[0].float(), a), b).to(output.dtype)

    def _on(self, device: torch.device) -> Factors:
        if self._stacked is None or self._stacked[0].device != device:
            a, b = zip(*self.blocks, strict=True)
            self._stacked = torch.cat(a).to(device), torch.cat(b, 1).to(device)
        return self._stacked

    def change(self, blocks: list[Factors]) -> None:
        self.blocks, self._stacked = blocks, None


def add_beside(model: nn.Module, layer: str, a: Tensor, b: Tensor) -> None:
    """Let a layer compute with a further update `b @ a`, of `a [r, d_in]` and `b [d_out, r]`, scaled."""
    module = model.get_submodule(layer)
    if (updates := _updates_of(module)) is None:
        updates = _Updates()
        module.register_forward_hook(updates)
    updates.change([*updates.blocks, (a.detach().float(), b.detach().float())])


def remove_beside(model: nn.Module, layer: str, a: Tensor, b: Tensor) -> None:
    """Take an update out again; ValueError if it is not beside the layer."""
    module = model.get_submodule(layer)
    updates = _updates_of(module)
    blocks = [] if updates is None else updates.blocks
    place = next((i for i, (x, y) in enumerate(blocks) if _equal(x, a) and _equal(y, b)), None)
    if updates is None or place is None:
        raise ValueError(f"the update is not beside the weight of layer {layer!r}; was it taken out before?")
    updates.change(blocks[:place] + blocks[place + 1 :])
    if not updates.blocks:
        hooks = module._forward_hooks
        del hooks[next(key for key, hook in hooks.items() if hook is updates)]


def beside(model: nn.Module) -> dict[str, list[Factors]]:
    """Return the updates beside the weights of every layer that has some."""
    found = ((name, _updates_of(module)) for name, module in model.named_modules())
    return {name: list(updates.blocks) for name, updates in found if updates is not None}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))


def _updates_of(module: nn.Module) -> _Updates | None:
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, _Updates)), None)
