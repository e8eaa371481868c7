"""What the methods share that work through a penalty on the adapted layers while a task is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from keeplora.layers import lora
from keeplora.layers.lora import ADAPTER
from keeplora.methods.base import Method, MethodConfig
from keeplora.progress import Track, silent
from keeplora.task import Task


class Penalised(Method):
    """Sequential LoRA that knows its adapted layers, by name, in `layers` while a task is trained."""

    def __init__(self, config: MethodConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        super().__init__(config, seed=seed, track=track)
        self.layers: dict[str, Any] = {}

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model, as sequential LoRA does.

        Raises:
            ValueError: If no layer matches the targets.
        """
        adapted = super().before_task(model, task)
        self.layers = dict(lora.lora_layers(adapted))
        return adapted

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge what was learned, as sequential LoRA does.

        Raises:
            LearningError: If the merge changed the outputs.
            ValueError: If a weight of the base model was trained, or would not be finite.
        """
        self.layers = {}
        return super().after_task(model, task)

    def abandon(self, adapted: nn.Module) -> nn.Module:
        """Give the model back as it was before the task."""
        self.layers = {}
        return super().abandon(adapted)


def trained_update(layer: Any) -> Tensor:
    """Return the update `scaling * b @ a` `[d_out, d_in]` of an adapted layer, through which gradients flow.

    It is in float32 inside a region of mixed precision too: the square of a small update vanishes in half precision.
    """
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with torch.autocast(a.device.type, enabled=False):
        update: Tensor = (layer.scaling[ADAPTER] * b.float()) @ a.float()
    return update
