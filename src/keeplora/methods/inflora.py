"""InfLoRA: each task learns outside the inputs of earlier tasks, along its own inputs (arXiv 2404.00228).

Before a task, `a` is the top of its inputs after the memory of earlier tasks' inputs is projected out, and is frozen;
only `b` is trained. After it, the memory grows by the fewest directions that bring the covered share of the task's
input energy to a threshold that rises from task to task.

The paper is followed where the released code departs from it: energy is that of the inputs (the code squares the gram's
singular values again, so its shares protect fewer directions), the first task keeps all directions it needs, both sides
of the gram are projected, and `a` is not divided by the root of 3. The rise of the threshold is the code's: task t = 0
to T - 1 takes `first + (last - first) t / T`. DualGPM's complement of a large memory only saves memory; it is not kept.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from keeplora import adapter, collect, subspace
from keeplora.collect import Track, silent
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.task import LearningError, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InfLoRAConfig(MethodConfig):
    """InfLoRA's options; the defaults are those of the paper's experiments on CIFAR-100."""

    rank: int = 10
    """Rank r of each layer's update."""
    alpha: float = 10.0
    """LoRA's alpha; the paper adds the product of the factors unscaled, which is alpha = rank."""
    targets: tuple[str, ...] = ("k_proj", "v_proj")
    """Names, or ends of names, of the linear layers to adapt."""
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

    def __init__(self, config: InfLoRAConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        super().__init__(config, seed=seed, track=track)
        self.bases: dict[str, Tensor] = {}
        self._num_tasks = math.inf
        self._num_learned = 0

    @property
    def share(self) -> float:
        """The share of the current task's input energy to protect; without a plan, that of the first task."""
        first, rise = self.config.feature_energy, self.config.last_feature_energy - self.config.feature_energy
        # More than this, and the directions of rounding noise would fill every layer at once.
        return min(first + rise * self._num_learned / self._num_tasks, 1 - subspace.ROUNDING)

    def plan(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the tasks, one by one, and take up their number: the threshold rises over it."""
        self._num_tasks = len(tasks)
        return tasks

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model with `a` set from the task's residual inputs and frozen.

        Raises:
            LearningError: If an input is not finite, or nothing is left to learn with.
            ValueError: If no layer matches the targets.
        """
        grams = collect.input_grams(model, task, adapter.linear_targets(model, self.config.targets), track=self.track)
        self.bases = {name: self.bases.get(name, gram[:, :0]).to(gram.device) for name, gram in grams.items()}
        rows = self._residual_rows(grams, task)
        d_outs = {name: len(model.get_parameter(f"{name}.weight")) for name in rows}
        factors = {name: (a, a.new_zeros(d_outs[name], len(a))) for name, a in rows.items()}
        alphas = {name: self.config.alpha * len(a) / self.config.rank for name, a in rows.items()}
        self.borrow(model)
        return adapter.attach(model, {name: len(a) for name, a in rows.items()}, alphas, factors=factors)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge the update, protect the task's dominant input directions, and certify that none leaked.

        Raises:
            ValueError: If the merge changed the outputs or a weight would not be finite.
        """
        updates, saved = adapter.factors_of(model), adapter.detach(model)
        merged, error = self.merge_checked(model, task)
        grams = collect.input_grams(merged, task, list(self.bases), track=self.track)
        added = subspace.new_directions(self.bases, grams, self.share)
        certificate = subspace.certify(self.bases, subspace.extend_bases(self.bases, added), updates)
        self.keep(TaskRecord(adapter=saved, directions=added, certificate=certificate, merge_error=error))
        return merged

    def remember(self, record: TaskRecord) -> None:
        """Protect the directions that a task recorded."""
        self._num_learned += 1
        empty = {name: value[:, :0] for name, value in record.directions.items()}
        self.bases = subspace.extend_bases(empty | self.bases, record.directions)

    def _residual_rows(self, grams: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
        rank, seed = self.config.rank, self.seed
        rows = {name: subspace.leading_inputs(gram, self.bases[name], rank, seed=seed) for name, gram in grams.items()}
        if not any(len(a) for a in rows.values()):
            raise LearningError(
                f"task {task.name!r}: no layer has free inputs left; lower feature_energy or add targets"
            )
        if smaller := [f"{name} ({len(a)})" for name, a in rows.items() if len(a) < rank]:
            message = "task %r: %d of %d layers have fewer than %d input directions left and take all: %s"
            logger.warning(message, task.name, len(smaller), len(rows), rank, ", ".join(smaller))
        return {name: a for name, a in rows.items() if len(a)}
