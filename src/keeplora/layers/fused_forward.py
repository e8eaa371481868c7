"""Layers lent a faster forward pass while a model is trained or read: the same function, less memory, fewer passes.

With `W' = W + b @ a`, the forward pass of a LoRA with a frozen `a` is one product, and so is the gradient at the
inputs; that of `b` needs `x @ a.T` alone. Quick GELU keeps its input in place of two tensors as large.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

from keeplora.layers import lora
from keeplora.layers.module_state import is_watched

EXACT = (torch.float32, torch.float64)

QUICK = 1.702  # Quick GELU is `x * sigmoid(QUICK * x)` (Hendrycks and Gimpel, arXiv 1606.08415).


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Lend a faster forward pass to the layers of a model that have one: quick GELU, and LoRA with a frozen `a`.

    First derivatives only: a loss that takes a second one inside is an error of torch's; train it outside.
    """
    lent: dict[nn.Module, Callable[..., Tensor]] = {}
    faster: dict[nn.Module, Callable[..., Tensor]] = {
        module: quick_gelu for module in model.modules() if type(module) is QuickGELUActivation
    }
    faster |= {layer: partial(_forward, layer) for layer in lora.lora_layers(model).values() if _is_plain(layer)}
    try:
        for module, forward in faster.items():
            if "forward" not in vars(module):
                module.forward = lent[module] = forward
        yield
    finally:
        for module, forward in lent.items():
            if vars(module).get("forward") is forward:
                del module.forward


def quick_gelu(x: Tensor) -> Tensor:
    """Return `x * sigmoid(1.702 x)`; in half precision by the stock operations, which round and overflow elsewhere."""
    if x.dtype not in EXACT:
        return x * torch.sigmoid(QUICK * x)
    return cast(Tensor, _QuickGELU.apply(x))


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return `x @ (weight + b @ a).T + bias`, `[..., d_out]`; only `x` and `b` get a gradient.

    `x` is `[..., d_in]`, `weight` `[d_out, d_in]`, `bias` `[d_out]`, `a` `[r, d_in]`, `b` `[d_out, r]`, scaled.
    """
    return cast(Tensor, _LoRALinear.apply(x, weight, bias, a, b))


class _QuickGELU(torch.autograd.Function):
    """`x * sigmoid(1.702 x) = silu(1.702 x) / 1.702`, and torch has both directions of SiLU in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * QUICK, inplace=True).div_(QUICK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scaled = x * QUICK
        return cast(Tensor, torch.ops.aten.silu_backward.grad_input(gradient, scaled, grad_input=scaled))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        inner = x.reshape(-1, x.shape[-1]) @ a.T if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(weight, a, b, inner)
        return F.linear(x, torch.addmm(weight, b, a), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, inner = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_b = None
        if ctx.needs_input_grad[0]:
            # Made again rather than kept: that costs as much as the update of a few rows.
            of_x = (rows @ torch.addmm(weight, b, a)).view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[4]:
            of_b = rows.T @ inner
        return of_x, None, None, None, of_b


def _is_plain(layer: lora.LoraLinear) -> bool:
    """Say whether a layer computes what `lora_linear` does, and nobody watches or replaces the layers inside it."""
    name = lora.ADAPTER
    if type(layer) is not lora.LoraLinear or layer.active_adapters != [name] or name not in layer.lora_A:
        return False
    base = layer.get_base_layer()
    inside = (base, layer.lora_A[name], layer.lora_B[name])
    return (
        all(type(one) is nn.Linear for one in inside)
        and not (layer.merged or layer.disable_adapters or layer.lora_variant or layer.lora_bias[name])
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
        and not layer.lora_A[name].weight.requires_grad
        and not any(is_watched(one) or "forward" in vars(one) for one in inside)
    )


def _forward(layer: lora.LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take the faster way where it is one, rounds no more than the stock one does, and is still what the layer does."""
    if args or kwargs or not _is_plain(layer) or not _pays(layer, x):
        return cast(Tensor, type(layer).forward(layer, x, *args, **kwargs))
    base, name = layer.get_base_layer(), lora.ADAPTER
    b = layer.scaling[name] * layer.lora_B[name].weight
    return lora_linear(x, cast(Tensor, base.weight), base.bias, layer.lora_A[name].weight, b)


def _pays(layer: lora.LoraLinear, x: Tensor) -> bool:
    """Say whether the rows are many enough, and everything is in one precision that is exact."""
    weight, name = cast(Tensor, layer.get_base_layer().weight), lora.ADAPTER
    d_out, d_in = weight.shape
    dtypes = {x.dtype, weight.dtype, layer.lora_A[name].weight.dtype, layer.lora_B[name].weight.dtype}
    is_exact = len(dtypes) == 1 and x.dtype in EXACT and not torch.is_autocast_enabled(x.device.type)
    return is_exact and x.numel() // d_in * (d_in + d_out) > d_in * d_out
