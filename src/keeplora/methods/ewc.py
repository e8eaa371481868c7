"""EWC: changes of weights that matter to earlier tasks are penalised (Kirkpatrick et al. 2017, arXiv 1612.00796).

Eq. (3) penalises the distance of every trained parameter from its earlier value, here the update `scaling * b @ a`, by
the diagonal of the Fisher information. In place of one penalty a task, the Fishers are summed around the latest weights
(Huszar 2017, arXiv 1712.03847), with the decay of Schwarz et al. (2018, arXiv 1805.06370).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from keeplora.config import NonNegative, Share
from keeplora.layers import lora
from keeplora.layers.fisher import fisher_diagonals
from keeplora.layers.lora import trained_update
from keeplora.methods.base import Method, MethodConfig, Step, TaskRecord
from keeplora.task import Task


@dataclass(frozen=True, kw_only=True)
class EWCConfig(MethodConfig):
    """EWC's options."""

    strength: NonNegative = 1000.0
    """Weight of the penalty (lambda). The paper gives no value for images; this is the one that the code of van de Ven
    et al. (github.com/GMvandeVen/continual-learning) takes for Split CIFAR-100."""
    decay: Share = 1.0
    """Factor of the earlier tasks' Fisher with every new task (gamma); 1 forgets nothing."""
    fisher_batch: PositiveInt = 8
    """Examples whose mean gradient is squared for the Fisher; fewer are more exact and slower."""


class EWC(Method):
    """Learn each task where the earlier ones allow it; `fishers` holds what they do, `[d_out, d_in]` a layer."""

    Config: ClassVar[type[MethodConfig]] = EWCConfig
    config: EWCConfig

    steps: ClassVar[tuple[Step, ...]] = (Step("features"),)
    stands_alone: ClassVar[bool] = False

    def start(self) -> None:
        self.fishers: dict[str, Tensor] = {}

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return `strength / 2 * sum F (scaling b a)^2` over all target weights (Eq. 3); None at the first task."""
        terms = []
        for name in (name for name in self.layers if name in self.fishers):  # in the model's order, resumed or not
            update = trained_update(self.layers[name])
            fisher = self.fishers[name] = self.fishers[name].to(update.device)
            terms.append(torch.dot(fisher.flatten(), update.square().flatten()))
        return self.config.strength / 2 * torch.stack(terms).sum() if terms else None

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge what was learned, and add the task's Fisher at the merged weights to that of the earlier tasks."""
        saved = lora.detach(model)
        merged, merge = self.merge_checked(model, task)
        fishers = self.features(merged, task)
        for name, earlier in self.fishers.items():
            fishers[name] += self.config.decay * earlier.to(fishers[name].device)
        self.keep(TaskRecord(adapter=saved, merge_error=merge.error, merge_loss=merge.loss, state=fishers))
        return merged

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the task's Fisher at the merged weights."""
        layers = lora.linear_targets(model, self.config.targets, self.config.towers)
        return fisher_diagonals(model, task, layers, batch_size=self.config.fisher_batch, track=self.track)

    def add_task(self, record: TaskRecord) -> None:
        self.fishers = dict(record.state)
