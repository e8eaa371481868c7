"""SEFE, its RegLoRA part: the largest elements of earlier updates stay as they are (arXiv 2505.02486).

Later updates are penalised where an earlier `dW = scaling * b @ a` has its 2 % largest elements: L1, a mean over the
places of a layer, a mean over layers, times 2500, as in the released code; a place that two tasks hold counts twice.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from keeplora.config import NonNegative
from keeplora.layers.lora import trained_update
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.task import Task


@dataclass(frozen=True, kw_only=True)
class SEFEConfig(MethodConfig):
    """SEFE's options; the defaults are the released code's."""

    key_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the elements of each layer's update that are its key elements (M %)."""
    strength: NonNegative = 2500.0
    """Weight of the penalty (lambda)."""


class SEFE(Method):
    """Learn each task away from the key elements of the earlier ones.

    `keys` holds by layer the flat places `[n]` of the key elements, ascending, and how many tasks hold each, `[n]`.
    """

    Config: ClassVar[type[MethodConfig]] = SEFEConfig
    config: SEFEConfig

    def start(self) -> None:
        self.keys: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        self._weights = {name: (places, counts / counts.sum()) for name, (places, counts) in self.keys.items()}
        return super().before_task(model, task)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return `strength` times the mean magnitude of the new update at the key elements; None at the first task."""
        terms = []
        for name in (name for name in self.layers if name in self._weights):  # in the model's order, resumed or not
            update = trained_update(self.layers[name]).flatten()
            places, weights = self._weights[name]
            places, weights = self._weights[name] = places.to(update.device), weights.to(update.device)
            terms.append(torch.dot(weights, update.index_select(0, places).abs()))
        return self.config.strength * torch.stack(terms).mean() if terms else None

    def add_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None
        for name, (a, b) in record.adapter.factors().items():
            new = key_elements(b @ a, self.config.key_share)
            places, counts = self.keys.get(name, (new[:0], torch.zeros(0)))
            united, inverse = torch.unique(torch.cat([places, new]), return_inverse=True)
            every = torch.cat([counts, torch.ones(len(new))])
            self.keys[name] = united, torch.zeros(len(united)).index_add_(0, inverse, every)

    def remove_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None
        for name, (a, b) in record.adapter.factors().items():
            places, counts = self.keys[name]
            gone = torch.isin(places, key_elements(b @ a, self.config.key_share))
            counts = counts - gone.to(counts.dtype)
            self.keys[name] = places[counts > 0], counts[counts > 0]


def key_elements(update: Tensor, share: float) -> Tensor:
    """Return the flat places `[n]` of the elements of an update `[d_out, d_in]` that are largest in magnitude.

    Their number is the share of all elements, rounded down, but at least one.
    """
    n = max(1, math.floor(round(share * update.numel(), 6)))  # 0.29 * 100 is a little below 29
    return update.abs().flatten().topk(n).indices
