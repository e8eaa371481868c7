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
    from keeplora.models.generative import ConversationTask as ConversationTask
    from keeplora.runs.config import RunConfig as RunConfig
    from keeplora.runs.loop import run as run
    from keeplora.runs.open import load_stream as load_stream
    from keeplora.task import Task as Task
    from keeplora.training.trainer import TrainConfig as TrainConfig
    from keeplora.training.trainer import fit as fit

_HOMES = {
    "evaluate": "evaluation.evaluate",
    "fused_layers": "layers.fused_forward",
    "Method": "methods.base",
    "MethodConfig": "methods.base",
    "LoRAFT": "methods.baselines",
    "ZeroShot": "methods.baselines",
    "KeepLoRA": "methods.keeplora",
    "KeepLoRAConfig": "methods.keeplora",
    "METHODS": "methods.registry",
    "ConversationTask": "models.generative",
    "RunConfig": "runs.config",
    "run": "runs.loop",
    "load_stream": "runs.open",
    "Task": "task",
    "TrainConfig": "training.trainer",
    "fit": "training.trainer",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'keeplora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"keeplora.{_HOMES[name]}"), name)
