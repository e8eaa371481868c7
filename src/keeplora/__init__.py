"""Continual learning of pre-trained vision-language models by KeepLoRA.

The names below are loaded when they are first used: importing the package alone loads no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keeplora.evaluation.evaluate import evaluate as evaluate
    from keeplora.layers.fused_forward import fused_layers as fused_layers
    from keeplora.methods.base import Method as Method
    from keeplora.methods.base import MethodConfig as MethodConfig
    from keeplora.methods.baselines import LoRAFT as LoRAFT
    from keeplora.methods.baselines import ZeroShot as ZeroShot
    from keeplora.methods.keeplora import KeepLoRA as KeepLoRA
    from keeplora.methods.keeplora import KeepLoRAConfig as KeepLoRAConfig
    from keeplora.methods.registry import METHODS as METHODS
    from keeplora.runs.config import RunConfig as RunConfig
    from keeplora.runs.loop import run as run
    from keeplora.runs.open import load_stream as load_stream
    from keeplora.task import Task as Task
    from keeplora.training.trainer import TrainConfig as TrainConfig
    from keeplora.training.trainer import fit as fit

_HOMES = {
    "evaluation.evaluate": ["evaluate"],
    "layers.fused_forward": ["fused_layers"],
    "methods.base": ["Method", "MethodConfig"],
    "methods.baselines": ["LoRAFT", "ZeroShot"],
    "methods.keeplora": ["KeepLoRA", "KeepLoRAConfig"],
    "methods.registry": ["METHODS"],
    "runs.config": ["RunConfig"],
    "runs.loop": ["run"],
    "runs.open": ["load_stream"],
    "task": ["Task"],
    "training.trainer": ["TrainConfig", "fit"],
}

__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"keeplora.{module}"), name)
    raise AttributeError(f"module 'keeplora' has no attribute {name!r}")
