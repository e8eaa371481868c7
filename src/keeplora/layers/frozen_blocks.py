"""LoRA layers whose first blocks are held fixed up to one trained number each, and whose last block is trained.

The update is `sum_k change_k * (b_k a_k) + b_new a_new`, a LoRA of all ranks together. What is held gets no gradient.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keeplora.layers import lora


def hold(adapted: nn.Module, directions: dict[str, tuple[Tensor, Tensor]], r: int) -> None:
    """Put directions into the first blocks of an adapted model's layers, times trained numbers that start at 0.

    Args:
        adapted: A LoRA model, each of whose layers has the rank of all its directions and `r` more.
        directions: The factors `(a [k r, d_in], b [d_out, k r])` of each layer's directions, free of any scaling.
        r: The rank of one block.
    """
    layers = lora.lora_layers(adapted)
    for name, (a, b) in directions.items():
        layer = layers[name]
        down, up = (factors[lora.ADAPTER].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        layer.lora_A[lora.ADAPTER] = _Down(a.to(down), down[-r:].clone())
        layer.lora_B[lora.ADAPTER] = _Up(b.to(up) / layer.scaling[lora.ADAPTER], up[:, -r:].clone())


def release(adapted: nn.Module) -> dict[str, Tensor]:
    """Make the layers plain LoRA layers again, with the same update; return the trained numbers `[k]` of each."""
    changes = {}
    for name, layer in lora.lora_layers(adapted).items():
        up = layer.lora_B[lora.ADAPTER]
        if isinstance(up, _Up):
            changes[name] = up.changes.detach().cpu()
            a, b = layer.lora_A[lora.ADAPTER].weight.detach(), up.weight.detach()
            layer.lora_A[lora.ADAPTER], layer.lora_B[lora.ADAPTER] = _plain(a), _plain(b)
    return changes


def _plain(weight: Tensor) -> nn.Linear:
    """Return a linear layer of a weight without drawing a random one first."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


class _Down(nn.Module):
    """The factor `a` in two blocks: one held, `[k r, d_in]`, and a new one, `[r, d_in]`, which alone is trained."""

    def __init__(self, held: Tensor, new: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", held, persistent=False)
        self.new = nn.Parameter(new)

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.get_buffer("held"), self.new])

    def forward(self, x: Tensor) -> Tensor:
        # One product for each block: a product with the whole would also compute the gradient of what is held.
        return torch.cat([F.linear(x, self.get_buffer("held")), F.linear(x, self.new)], dim=-1)


class _Up(nn.Module):
    """The factor `b` in blocks: each held one, of `[d_out, k r]` together, times a trained number; and a new one."""

    def __init__(self, held: Tensor, new: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", held, persistent=False)
        self.new = nn.Parameter(new)
        self.changes = nn.Parameter(new.new_zeros(held.shape[1] // new.shape[1]))

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.get_buffer("held") * self._by_column(), self.new], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        held = self.get_buffer("held")
        earlier, newest = x.split([held.shape[1], self.new.shape[1]], dim=-1)
        return F.linear(earlier * self._by_column(), held) + F.linear(newest, self.new)

    def _by_column(self) -> Tensor:
        return self.changes.unsqueeze(1).expand(-1, self.new.shape[1]).flatten()
