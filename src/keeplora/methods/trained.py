"""The update of a weight while it is trained: what a penalty on the weights is a function of."""

from typing import Any

import torch
from torch import Tensor

from keeplora.adapter import ADAPTER


def trained_update(layer: Any) -> Tensor:
    """Return the update `scaling * b @ a` `[d_out, d_in]` of an adapted layer, through which gradients flow.

    It is in float32 inside a region of mixed precision too: the square of a small update vanishes in half precision.
    """
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with torch.autocast(a.device.type, enabled=False):
        update: Tensor = (layer.scaling[ADAPTER] * b.float()) @ a.float()
    return update
