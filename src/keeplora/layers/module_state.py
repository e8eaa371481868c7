"""What is changed of a module for a while and given back: gradient flags, modes, dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def nothing_requires_grad(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient; give every flag back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; give each module its own mode back."""
    with _modes_given_back(model):
        model.eval()
        yield


@contextmanager
def training_mode_without_dropout(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode, but without what makes it random or changes it: dropout and running statistics.

    transformers checkpoints activations in training mode alone. Dropout is a module, or a number that a module hands to
    a function (`attention_dropout`, `layerdrop`); the numbers are 0 inside.
    """
    numbers = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if ("dropout" in name or name == "layerdrop") and isinstance(value, float)
    ]
    with _modes_given_back(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd | _NormBase):
                module.eval()
        try:
            for module, name, _ in numbers:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, value in numbers:
                setattr(module, name, value)


@contextmanager
def _modes_given_back(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def is_watched(module: nn.Module) -> bool:
    """Say whether hooks look at what goes through a module, other than those that only read gradients."""
    found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not getattr(hook, "reads_gradients_only", False) for hooks in found for hook in hooks.values())


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
