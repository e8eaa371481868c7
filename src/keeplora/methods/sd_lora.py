"""SD-LoRA: directions of earlier tasks stay fixed, their magnitudes are learned on with every new task.

The weight is `W0 + sum_k alpha_k D_k + b_t a_t` (arXiv 2501.13198): `D_k` is what task k learned, `b_k a_k`, at unit
Frobenius norm and frozen; the magnitudes `alpha_k`, one for each earlier task and layer, are trained together with the
new pair. Every task is merged, so its adapter holds only the changes: a stock LoRA of all ranks so far, whose first
blocks are the earlier directions times the change of their magnitude, which starts at 0; the last is the new pair.

The paper divides by the norm of the product; the released code by the product of the factors' norms, shares one
magnitude a task between all layers, and starts them all again at 0.8 with every task, which changes the function before
anything is learned. The paper is followed, and a magnitude goes on from what it was. As in the released code, the new
pair is not normalised while it is trained. The variants that bound the growth of the rank, SD-LoRA-RR (falling ranks)
and SD-LoRA-KD (distillation into earlier directions), are not built.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from keeplora.config import PositiveNumber
from keeplora.layers import lora
from keeplora.layers.frozen_blocks import hold, release
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.task import Task

SUFFIX = ".magnitudes"
"""Ends the name of a layer's entry in a record's state."""


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
    fixed: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")

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
        hold(adapted, self.directions, self.config.rank)
        return adapted

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge the new direction and the changes of the earlier magnitudes."""
        changes = release(model)
        saved = lora.detach(model)
        merged, error = self.merge_checked(model, task)
        state = {}
        for name, (a, b) in self._newest(saved).items():
            earlier = self.magnitudes[name] + changes[name] if changes else torch.zeros(0)
            state[name + SUFFIX] = torch.cat([earlier, (b @ a).norm().reshape(1)])
        self.keep(TaskRecord(adapter=saved, merge_error=error, state=state))
        return merged

    def add_task(self, record: TaskRecord) -> None:
        """Take up the direction that a task learned, and what it made of the magnitudes."""
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
