"""Continual learning of pre-trained vision-language models by KeepLoRA."""

from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.fused_forward import fused_layers
from keeplora.methods.registry import METHODS, KeepLoRA, KeepLoRAConfig, LoRAFT, Method, MethodConfig, ZeroShot
from keeplora.runs.config import RunConfig, load_stream
from keeplora.runs.loop import run
from keeplora.task import Task
from keeplora.training.trainer import TrainConfig, fit

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
