"""InfLoRA: each task learns outside the inputs of earlier tasks, along its own inputs (arXiv 2404.00228).

Before a task, `a` is the top of its inputs after the memory of earlier tasks' inputs is projected out, and is frozen;
only `b` is trained. After it, the memory grows by the fewest directions that bring the covered share of the task's
input energy to a threshold that rises from task to task.

The thresholds are the released code's, and so is what they are shares of: it takes the gram's singular values for the
inputs' and squares them again. With the paper's rule, `energy="inputs"`, they protect several times as many directions.
Elsewhere the paper is followed: the first task keeps all directions it needs, and `a` is orthonormal, not divided by
the root of 3. The threshold rises as the code's, `first + (last - first) t / T` at task t = 0 to T - 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from keeplora.config import PositiveNumber
from keeplora.errors import LearningError
from keeplora.layers import lora, weights
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.lora import alphas_for, warn_of_small_ranks
from keeplora.layers.module_state import device_of
from keeplora.methods.base import Method, MethodConfig, Step
from keeplora.methods.task_record import TaskRecord
from keeplora.progress import Track, silent
from keeplora.subspace import protected as subspace
from keeplora.subspace.certificate import certificates, require_no_leak
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
    feature_energy: float = 0.95
    """Share of each layer's input energy that is protected after the first task (lamb of the released code)."""
    last_feature_energy: float = 1.0
    """Share that the threshold rises towards over the tasks (lame of the released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("feature_energy", "last_feature_energy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is a share; give a number from 0 to 1")


class InfLoRA(Method):
    """Learn each task orthogonally to the inputs of earlier ones; `bases` holds these, `[d_in, k]` a layer."""

    Config: ClassVar[type[MethodConfig]] = InfLoRAConfig
    config: InfLoRAConfig

    steps: ClassVar[tuple[Step, ...]] = (Step("initialise"), Step("features"))

    def __init__(self, config: InfLoRAConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        super().__init__(config, seed=seed, track=track)
        self.bases: dict[str, Tensor] = {}
        self._num_tasks, self._num_learned = math.inf, 0

    @property
    def share(self) -> float:
        """The share of the current task's input energy to protect; without a plan, that of the first task."""
        first, rise = self.config.feature_energy, self.config.last_feature_energy - self.config.feature_energy
        # More than this, and the directions of rounding noise would fill every layer at once.
        return min(first + rise * self._num_learned / self._num_tasks, 1 - subspace.ROUNDING)

    def schedule(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the tasks, one by one, and take up their number: the threshold rises over it."""
        self._num_tasks = len(tasks)
        return tasks

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model with `a` set from the task's residual inputs and frozen.

        Raises:
            LearningError: If an input is not finite, or nothing is left to learn with.
            ValueError: If no layer matches the targets, one shares its weight, or the model has an adapter already.
        """
        self._start_bases(model, self.targets_of(model))
        rows = self.initialise(model, task)
        warn_of_small_ranks({name: len(rows.get(name, ())) for name in self.bases}, self.config.rank, task.name)
        d_outs = {name: weights.shape_of(model, name)[0] for name in rows}
        factors = {name: (a, a.new_zeros(d_outs[name], len(a))) for name, a in rows.items()}
        ranks = {name: len(a) for name, a in rows.items()}
        self.snapshot(model)
        return lora.attach(model, ranks, alphas_for(ranks, self.config.alpha, self.config.rank), factors=factors)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge the update, protect the task's dominant input directions, and certify that none leaked.

        Raises:
            ValueError: If the update is not finite or left its subspace, or the merge changed the outputs.
        """
        updates, saved = lora.factors_of(model), lora.detach(model)
        require_no_leak(updates, self.bases, task.name)
        merged, error = self.merge_checked(model, task)
        added = self.features(merged, task)
        certificate = certificates(self.bases, subspace.extend_bases(self.bases, added), updates)
        self.keep(TaskRecord(adapter=saved, directions=added, certificate=certificate, merge_error=error))
        return merged

    def add_task(self, record: TaskRecord) -> None:
        """Protect the directions that a task recorded."""
        self._num_learned += 1
        empty = {name: value[:, :0] for name, value in record.directions.items()}
        self.bases = subspace.extend_bases(empty | self.bases, record.directions)

    def remove_task(self, record: TaskRecord) -> None:
        """Protect the directions that a task recorded no longer."""
        self.bases = subspace.remove_directions(self.bases, record.directions)
        self._num_learned -= 1

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the dominant directions of the task's inputs that no basis covers yet."""
        grams = input_grams(model, task, list(self.bases), track=self.track)
        if self.config.energy == "squared":
            grams = {name: gram @ gram for name, gram in grams.items()}
        return subspace.new_directions(self.bases, grams, self.share)

    def protect(self, model: nn.Module) -> None:
        """Start the bases: empty before the first task."""
        self._start_bases(model, lora.linear_targets(model, self.config.targets))

    def protected(self) -> dict[str, Tensor]:
        """Return the bases."""
        return dict(self.bases)

    def _start_bases(self, model: nn.Module, targets: list[str]) -> None:
        empty = {name: torch.zeros(weights.shape_of(model, name)[1], 0) for name in targets}
        self.bases = {name: self.bases.get(name, none).to(device_of(model)) for name, none in empty.items()}

    def initialise(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the start of `a` of every layer that has room: the top of the task's residual inputs."""
        grams = input_grams(model, task, list(self.bases), track=self.track)
        rank, seed = self.config.rank, self.seed
        rows = {name: subspace.leading_inputs(gram, self.bases[name], rank, seed=seed) for name, gram in grams.items()}
        if not any(len(a) for a in rows.values()):
            raise LearningError(f"task {task.name!r}: no layer has room left; lower feature_energy or add targets")
        return {name: a for name, a in rows.items() if len(a)}
