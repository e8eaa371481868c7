"""EWC: changes of weights that matter to earlier tasks are penalised (Kirkpatrick et al. 2017, arXiv 1612.00796).

How much a weight matters is its entry in the Fisher information's diagonal. Eq. (3) penalises the distance of every
trained parameter from its value after the earlier task. Here each task's LoRA factors start anew and are merged, so
they have no such value; the weights that they change have one. The Fisher is therefore taken of the target weights, and
the distance from the merged weights is the update `scaling * b @ a`. Eq. (3) would keep one penalty a task, each around
its own weights; here the Fishers are summed around the latest weights, as Huszar (2017, arXiv 1712.03847) derives, with
the decay of Schwarz et al. (2018, arXiv 1805.06370). Nothing protects what the model knew before the first task.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.layers import lora
from keeplora.layers.fisher import fisher_diagonals
from keeplora.methods.base import MethodConfig, Step
from keeplora.methods.penalty import Penalised, trained_update
from keeplora.methods.task_record import TaskRecord
from keeplora.progress import Track, silent
from keeplora.task import Task


@dataclass(frozen=True, kw_only=True)
class EWCConfig(MethodConfig):
    """EWC's options."""

    strength: float = 1000.0
    """Weight of the penalty (lambda). The paper gives no value for images; this is the one that the code of van de Ven
    et al. (github.com/GMvandeVen/continual-learning) takes for Split CIFAR-100."""
    decay: float = 1.0
    """Factor of the earlier tasks' Fisher with every new task (gamma); 1 forgets nothing."""
    fisher_batch: int = 8
    """Examples whose mean gradient is squared for the Fisher; fewer are more exact and slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength = {self.strength} must be a number of at least 0; 0 is sequential LoRA")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay = {self.decay} must be from 0, only the latest task counts, to 1, all count alike")
        if self.fisher_batch < 1:
            raise ValueError(f"fisher_batch = {self.fisher_batch} must be at least 1")


class EWC(Penalised):
    """Learn each task where the earlier ones allow it; `fishers` holds what they do, `[d_out, d_in]` a layer."""

    Config: ClassVar[type[MethodConfig]] = EWCConfig
    config: EWCConfig

    steps: ClassVar[tuple[Step, ...]] = (Step("features"),)
    stands_alone: ClassVar[bool] = False

    def __init__(self, config: EWCConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        super().__init__(config, seed=seed, track=track)
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
        """Merge what was learned, and add the task's Fisher at the merged weights to that of the earlier tasks.

        Raises:
            LearningError: If the merge changed the outputs, or a loss or a gradient is not finite.
            ValueError: If a weight of the base model was trained, or would not be finite.
        """
        self.layers = {}
        saved = lora.detach(model)
        merged, error = self.merge_checked(model, task)
        fishers = self.features(merged, task)
        for name, earlier in self.fishers.items():
            fishers[name] += self.config.decay * earlier.to(fishers[name].device)
        self.keep(TaskRecord(adapter=saved, merge_error=error, state=fishers))
        return merged

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the task's Fisher at the merged weights."""
        layers = lora.linear_targets(model, self.config.targets)
        return fisher_diagonals(model, task, layers, batch_size=self.config.fisher_batch, track=self.track)

    def add_task(self, record: TaskRecord) -> None:
        """Take up the Fisher of all tasks up to a finished one."""
        self.fishers = dict(record.state)
