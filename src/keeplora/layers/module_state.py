"""Borrow from a module and give back: gradient flags, training modes, weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def only_these_require_grad(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let only the given parameters require a gradient; give every flag back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; give each module its own mode back."""
    before = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def other_weights(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let the layers named have other weights `[d_out, d_in]`; give each its own tensor back."""
    parameters = {name: model.get_parameter(f"{name}.weight") for name in weights}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def is_watched(module: nn.Module) -> bool:
    """Say whether hooks look at what goes through a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(len, hooks))


def is_wrapped(model: nn.Module) -> bool:
    """Say whether something stands around a model that wants it to be called as a whole: a compiler, or a hook.

    PEFT's wrapper does not, nor do hooks on the layers inside; the model inside that wrapper is asked as well.
    """
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return is_watched(model) or is_watched(inner) or any(map(is_compiled, model.modules()))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module is what `torch.compile` returns, or was compiled in place."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
