"""Continual learning of pre-trained vision-language models by KeepLoRA."""

from keeplora.evaluate import evaluate
from keeplora.fused import fused_layers
from keeplora.methods import METHODS, KeepLoRA, KeepLoRAConfig, LoRAFT, Method, MethodConfig, ZeroShot
from keeplora.run import run
from keeplora.stream import RunConfig, load_stream
from keeplora.task import Task
from keeplora.train import TrainConfig, fit

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
