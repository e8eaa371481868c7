"""The one place that reads the weights of layers, whole and in float32 one at a time, adds to them, or hashes them."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn


def shape_of(model: nn.Module, layer: str) -> tuple[int, int]:
    """Return `(d_out, d_in)` of a layer's weight."""
    module: Any = model.get_submodule(layer)
    d_out, d_in = (module.out_features, module.in_features) if is_quantised(module) else _stored(model, layer).shape
    return d_out, d_in


def read_weight(model: nn.Module, layer: str) -> Tensor:
    """Return the weight of a layer in float32, `[d_out, d_in]`, on its device; it may be the stored one itself.

    One of 4 bits is what its numbers stand for.
    """
    module = model.get_submodule(layer)
    return dequantised(module) if is_quantised(module) else _stored(model, layer).detach().float()


def is_quantised(module: nn.Module) -> bool:
    """Say whether the weight of a layer is of 4 bits, as bitsandbytes has it."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantised(module: Any) -> Tensor:
    """Return what the numbers of a quantised weight stand for, `[d_out, d_in]`, in float32."""
    extra: Any = import_module("bitsandbytes.functional")  # Whoever has such a weight has it.
    return cast(Tensor, extra.dequantize_4bit(module.weight.data, module.weight.quant_state)).float()


def takes_updates(model: nn.Module, layer: str) -> bool:
    """Say whether the weight of a layer is fine enough for updates to be merged into it: float32 at least."""
    module = model.get_submodule(layer)
    return not is_quantised(module) and torch.finfo(_stored(model, layer).dtype).bits >= 32


def add_update(model: nn.Module, layer: str, update: Tensor) -> None:
    """Add an update `[d_out, d_in]` to the weight of a layer: in float32, rounded once to the precision it has."""
    with torch.no_grad():
        _stored(model, layer).copy_(with_update(_stored(model, layer), update))


def with_update(weight: Tensor, update: Tensor) -> Tensor:
    """Return what `add_update` makes of a stored weight `[d_out, d_in]`, in its precision."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(wide) + update.to(weight.device, wide)).to(weight.dtype)


@contextmanager
def other_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let the layers named have other weights `[d_out, d_in]`; give each its own tensor back."""
    parameters = {name: _stored(model, name) for name in weights}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over the names, types, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(model: nn.Module) -> dict[str, bytes]:
    """Return a 128-bit hash (XXH3) of the bytes of every parameter: whatever changes in one, its hash changes."""
    return {
        name: xxhash.xxh3_128_digest(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for name, parameter in model.named_parameters()
    }


def require_own_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Check that no other name in the model, a tied embedding's say, owns the weight of a layer, or name both."""
    owners: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel():
            owners.setdefault((parameter.device, parameter.data_ptr()), []).append(name)
    for layer in layers:
        module = model.get_submodule(layer)
        weight = cast(Tensor, module.weight) if is_quantised(module) else _stored(model, layer)
        if others := [name for name in owners[weight.device, weight.data_ptr()] if name != f"{layer}.weight"]:
            raise ValueError(
                f"layer {layer!r} shares its weight with {others[0]!r}: an update of the one would change the other."
                " Give each its own weight (for a tied embedding: tie_word_embeddings = False, and a copy of it), or"
                " leave the layer out of targets"
            )


def _stored(model: nn.Module, layer: str) -> nn.Parameter:
    weight = getattr(model.get_submodule(layer), "weight", None)
    if isinstance(weight, nn.Parameter) and weight.is_floating_point():
        return weight
    kind = f"of {weight.dtype}" if isinstance(weight, nn.Parameter) else "that is computed from something else"
    raise ValueError(
        f"layer {layer!r} has a weight {kind}, which takes no update; leave it out of targets, or make it a plain"
        " floating-point parameter (torch.nn.utils.parametrize.remove_parametrizations)"
    )
