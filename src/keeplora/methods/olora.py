"""O-LoRA: each task's `a` is kept orthogonal to those of all earlier tasks by a penalty (arXiv 2310.14152).

Updates whose `a` have orthogonal rows do not touch. The penalty is `lambda_1 * sum_i L_orth(A_i, A_t)`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from keeplora.config import NonNegative
from keeplora.layers.lora import ADAPTER
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.subspace.protected import remove_directions


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(MethodConfig):
    """O-LoRA's options; the defaults are those of the release's scripts for the standard benchmark."""

    lambda_1: NonNegative = 0.5
    """Weight of the overlap with the earlier tasks' factors."""
    lambda_2: NonNegative = 0.0
    """Weight of the Frobenius norms of the new factors."""
    overlap: Literal["squared", "absolute"] = "squared"
    """What is summed over the entries of `a @ a_i.T`: their squares (the paper) or absolute values (the release)."""


class OLoRA(Method):
    """Learn each task with an `a` orthogonal to those of the earlier ones; `earlier` holds these, `[sum r, d_in]`."""

    Config: ClassVar[type[MethodConfig]] = OLoRAConfig
    config: OLoRAConfig

    def start(self) -> None:
        self.earlier: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return `lambda_1 * sum_i L_orth(A_i, A_t)` over all layers, plus the norms' term; None without either."""
        terms = []
        for name, layer in self.layers.items():
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            with torch.autocast(a.device.type, enabled=False):
                if name in self.earlier and self.config.lambda_1 > 0:
                    earlier = self.earlier[name] = self.earlier[name].to(a.device)
                    overlaps = a.float() @ earlier.T
                    sizes = overlaps.square() if self.config.overlap == "squared" else overlaps.abs()
                    terms.append(self.config.lambda_1 * sizes.sum())
                if self.config.lambda_2 > 0:
                    terms.append(self.config.lambda_2 * (a.float().norm() + b.float().norm()))
        return torch.stack(terms).sum() if terms else None

    def add_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None
        for name, (a, _) in record.adapter.factors().items():
            earlier = self.earlier.get(name, a[:0])
            self.earlier[name] = torch.cat([earlier, a.to(earlier.device)])

    def remove_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None
        columns = {name: rows.T for name, rows in self.earlier.items()}
        rest = remove_directions(columns, {name: a.T for name, (a, _) in record.adapter.factors().items()})
        self.earlier = {name: kept.T.contiguous() for name, kept in rest.items()}
