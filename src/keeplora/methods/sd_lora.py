"""SD-LoRA: directions of earlier tasks stay fixed, their magnitudes are learned on with every new task.

The weight is `W0 + sum_k alpha_k D_k + b_t a_t` (arXiv 2501.13198): `D_k` is task k's `b_k a_k` at unit Frobenius norm,
frozen; the `alpha_k`, one a layer, are trained with the new pair. Each adapter holds only the changes: a stock LoRA of
all ranks so far, whose first blocks are earlier directions times the change of their magnitude, which starts at 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from keeplora.config import PositiveNumber
from keeplora.layers import lora
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.task import Task

SUFFIX = ".magnitudes"  # Ends the name of a layer's entry in a record's state.


@dataclass(frozen=True, kw_only=True)
class SDLoRAConfig(MethodConfig):
    """SD-LoRA's options; the defaults are the paper's."""

    rank: PositiveInt = 10
    """Rank r of each layer's new direction."""
    alpha: PositiveNumber = 10.0
    """LoRA's alpha; the paper adds the product of the factors unscaled, which is alpha = rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names, or ends of names, of the linear layers to adapt."""


class SDLoRA(Method):
    """Learn a new direction and the magnitudes of all earlier ones; `magnitudes` holds these, `[k]` a layer.

    `directions` holds the factors `(a [k r, d_in], b [d_out, k r])` of the earlier tasks' directions by layer: the
    product of each task's block has unit Frobenius norm.
    """

    Config: ClassVar[type[MethodConfig]] = SDLoRAConfig
    config: SDLoRAConfig

    stands_alone: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = (*Method.fixed, "rank", "alpha")

    def start(self) -> None:
        self.directions: dict[str, tuple[Tensor, Tensor]] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self._num_learned = 0

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model to train: a LoRA of all ranks so far whose earlier blocks are frozen up to a magnitude."""
        targets = self.targets_of(model)
        blocks = 1 + self._num_learned
        # The scaling, alpha / rank, stays what it is for one block.
        adapted = self.attach(model, dict.fromkeys(targets, blocks * self.config.rank))
        _hold(adapted, self.directions, self.config.rank)
        return adapted

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        changes = _release(model)
        saved = lora.detach(model)
        merged, merge = self.merge_checked(model, task)
        state = {}
        for name, (a, b) in self._newest(saved).items():
            earlier = self.magnitudes[name] + changes[name] if changes else torch.zeros(0)
            state[name + SUFFIX] = torch.cat([earlier, (b @ a).norm().reshape(1)])
        self.keep(TaskRecord(adapter=saved, merge_error=merge.error, merge_loss=merge.loss, state=state))
        return merged

    def add_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None
        self._num_learned += 1
        self.magnitudes = {name.removesuffix(SUFFIX): value.cpu() for name, value in record.state.items()}
        for name, (a, b) in self._newest(record.adapter).items():
            unit = b / (b @ a).norm().clamp_min(torch.finfo(b.dtype).tiny)
            old_a, old_b = self.directions.get(name, (a[:0], b[:, :0]))
            self.directions[name] = (torch.cat([old_a, a]), torch.cat([old_b, unit], dim=1))

    def _newest(self, saved: SavedAdapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors `(a [r, d_in], scaling * b [d_out, r])` of the direction that a task added."""
        r = self.config.rank
        return {name: (a[-r:].cpu(), b[:, -r:].cpu()) for name, (a, b) in saved.factors().items()}


def _hold(adapted: nn.Module, directions: dict[str, tuple[Tensor, Tensor]], r: int) -> None:
    """Put directions into the first blocks, of rank `r`, of adapted layers, times trained numbers that start at 0."""
    layers = lora.lora_layers(adapted)
    for name, (a, b) in directions.items():
        layer = layers[name]
        down, up = (factors[lora.ADAPTER].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        layer.lora_A[lora.ADAPTER] = _Down(a.to(down), down[-r:].clone())
        layer.lora_B[lora.ADAPTER] = _Up(b.to(up) / layer.scaling[lora.ADAPTER], up[:, -r:].clone())


def _release(adapted: nn.Module) -> dict[str, Tensor]:
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
