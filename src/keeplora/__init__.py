"""Continual learning of pre-trained vision-language models by KeepLoRA.

The names below are loaded when they are first used: importing the package alone loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keeplora.evaluation.evaluate import evaluate
    from keeplora.layers.fused_forward import fused_layers
    from keeplora.methods.base import Method, MethodConfig
    from keeplora.methods.baselines import LoRAFT, ZeroShot
    from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
    from keeplora.methods.registry import METHODS
    from keeplora.runs.config import RunConfig
    from keeplora.runs.loop import run
    from keeplora.runs.open import load_stream
    from keeplora.task import Task
    from keeplora.training.trainer import TrainConfig, fit

_HOMES = {
    "METHODS": "methods.registry",
    "KeepLoRA": "methods.keeplora",
    "KeepLoRAConfig": "methods.keeplora",
    "LoRAFT": "methods.baselines",
    "Method": "methods.base",
    "MethodConfig": "methods.base",
    "RunConfig": "runs.config",
    "Task": "task",
    "TrainConfig": "training.trainer",
    "ZeroShot": "methods.baselines",
    "evaluate": "evaluation.evaluate",
    "fit": "training.trainer",
    "fused_layers": "layers.fused_forward",
    "load_stream": "runs.open",
    "run": "runs.loop",
}

__all__ = [
    "METHODS",
    "KeepLoRA",
    "KeepLoRAConfig",
    "LoRAFT",
    "Method",
    "MethodConfig",
    "RunConfig",
    "Task",
    "TrainConfig",
    "ZeroShot",
    "evaluate",
    "fit",
    "fused_layers",
    "load_stream",
    "run",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'keeplora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"keeplora.{_HOMES[name]}"), name)
