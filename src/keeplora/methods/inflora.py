"""InfLoRA: each task learns outside the inputs of earlier tasks, along its own inputs (arXiv 2404.00228).

Before a task, `a` is the top of its inputs after the memory of earlier tasks' inputs is projected out, and is frozen;
only `b` is trained. After it, the memory grows by the fewest directions that bring the covered share of the task's
input energy to a threshold, which rises as `first + (last - first) t / T` at task t = 0 to T - 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from keeplora.config import PositiveNumber, Share
from keeplora.layers import lora, weights
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.module_state import device_of
from keeplora.methods.base import MethodConfig, Step
from keeplora.methods.protecting import Initialisation, Protecting
from keeplora.subspace import protected
from keeplora.task import Task


@dataclass(frozen=True, kw_only=True)
class InfLoRAConfig(MethodConfig):
    """InfLoRA's options; the defaults are those of the paper's experiments on CIFAR-100."""

    rank: PositiveInt = 10
    """Rank r of each layer's update."""
    alpha: PositiveNumber = 10.0
    """LoRA's alpha; the paper adds the product of the factors unscaled, which is alpha = rank."""
    targets: tuple[str, ...] = ("k_proj", "v_proj")
    """Names, or ends of names, of the linear layers to adapt."""
    energy: Literal["squared", "inputs"] = "squared"
    """What the shares are of: the squared eigenvalues of the inputs' gram (the code, which the default shares are for),
    or the eigenvalues, the energy of the inputs (the paper); the first protects fewer directions."""
    feature_energy: Share = 0.95
    """Share of each layer's input energy that is protected after the first task (lamb of the released code)."""
    last_feature_energy: Share = 1.0
    """Share that the threshold rises towards over the tasks (lame of the released code)."""


class InfLoRA(Protecting):
    """Learn each task orthogonally to the inputs of earlier ones, which the bases cover."""

    Config: ClassVar[type[MethodConfig]] = InfLoRAConfig
    config: InfLoRAConfig

    steps: ClassVar[tuple[Step, ...]] = (Step("initialise", Initialisation), Step("features"))

    def start(self) -> None:
        super().start()
        self._num_tasks = math.inf

    @property
    def share(self) -> float:
        """The share of the current task's input energy to protect; without a schedule, that of the first task."""
        first, rise = self.config.feature_energy, self.config.last_feature_energy - self.config.feature_energy
        # More than this, and the directions of rounding noise would fill every layer at once.
        return min(first + rise * self._num_learned / self._num_tasks, 1 - protected.ROUNDING)

    def schedule(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the tasks, one by one, and take up their number: the threshold rises over it."""
        self._num_tasks = len(tasks)
        return tasks

    def protect(self, model: nn.Module) -> None:
        """Start the bases of all target layers: empty before the first task."""
        names = lora.linear_targets(model, self.config.targets, self.config.towers)
        empty = {name: torch.zeros(weights.shape_of(model, name)[1], 0) for name in names}
        self.bases = {name: self.bases.get(name, none).to(device_of(model)) for name, none in empty.items()}

    def initialise(self, model: nn.Module, task: Task) -> Initialisation:
        """Return the start of every layer that has capacity: `a` is the top of the task's residual inputs."""
        start = Initialisation({}, {}, {})
        for name, gram in input_grams(model, task, list(self.bases), track=self.track).items():
            rows = protected.leading_inputs(gram, self.bases[name], self.config.rank, seed=self.seed)
            if len(rows):
                start.a[name], start.b[name] = rows, rows.new_zeros(weights.shape_of(model, name)[0], len(rows))
        return start

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        grams = input_grams(model, task, list(self.bases), track=self.track)
        if self.config.energy == "squared":
            grams = {name: gram @ gram for name, gram in grams.items()}
        return protected.new_directions(self.bases, grams, self.share)
