"""Muon in float32, its work shared by the processes; that of torch multiplies in bfloat16, slow where a CPU has none.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; rates as in Liu et al., "Muon is
scalable for LLM training", 2025.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM, DECAY, STEPS = 0.95, 0.05, 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(gradient: Tensor) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations."""
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    wide = wide / wide.norm().clamp(min=1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=second, alpha=third), wide, beta=first)
    return wide if gradient.shape[0] <= gradient.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """An optimiser of matrices: the momentum's nearest orthogonal matrix, as large as a step of AdamW would be."""

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step; each process orthogonalises a share of the matrices."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        chosen = [(one, group["lr"]) for group in self.param_groups for one in group["params"] if one.grad is not None]
        updates = []
        for number, (parameter, _) in enumerate(chosen):
            kept = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            kept.lerp_(parameter.grad, 1 - MOMENTUM)
            ahead = parameter.grad.lerp(kept, MOMENTUM)
            updates.append(orthogonal(ahead) if number % ranks == rank else torch.zeros_like(parameter))
        if ranks > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            parts = flat.split([update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        for (parameter, rate), update in zip(chosen, updates, strict=True):
            parameter.mul_(1 - rate * DECAY)
            parameter.add_(update, alpha=-rate * 0.2 * max(parameter.shape) ** 0.5)
