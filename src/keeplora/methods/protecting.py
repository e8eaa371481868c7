"""What the methods share that protect a subspace of every layer's inputs, to which later updates stay orthogonal."""

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from keeplora.errors import LearningError, listed
from keeplora.layers import lora
from keeplora.layers.gradients import NamedTensors
from keeplora.methods.base import HEAD, Method, TaskRecord
from keeplora.subspace import protected
from keeplora.subspace.certificate import certificates, require_no_leak
from keeplora.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Initialisation(NamedTensors):
    """By layer, the start of a task's adapter; a layer with nothing to learn with has no `a` and `b`."""

    a: dict[str, Tensor]  # `[r, d_in]`: orthonormal rows outside the bases, frozen while a task is trained.
    b: dict[str, Tensor]  # `[d_out, r]`
    surviving: dict[str, float]  # The share of the gradient's norm that the bases leave, where it was measured.


class Protecting(Method):
    """Learn each task orthogonally to `bases`, `[d_in, k]` a layer, which grow by the directions of its inputs."""

    def start(self) -> None:
        self.bases: dict[str, Tensor] = {}
        self._surviving: dict[str, float] = {}
        self._num_learned = 0
        self._told_of_smaller = False
        self._left_alone: set[str] = set()

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model with `a` set outside the bases and frozen."""
        self.targets_of(model)
        self.protect(model)
        start = self.initialise(model, task)
        if not start.a:
            raise LearningError(
                f"task {task.name!r}: no layer has a residual direction left to learn with; the protected subspaces"
                " are full, or nothing reaches the targets. Lower weight_energy or feature_energy, or add targets"
            )
        self._surviving = start.surviving
        ranks = {name: len(start.a.get(name, ())) for name in self.bases}
        self._tell_of_small_ranks(ranks, task.name)
        head = self.new_head(model, task)
        factors = {name: (a, start.b[name]) for name, a in start.a.items()}
        adapted = self.attach(model, {name: ranks[name] for name in factors}, factors=factors, scales=self.scales())
        if head is not None:
            adapted.add_module(HEAD, head)
        return adapted

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        require_no_leak(lora.factors_of(model), self.bases, task.name, allowed=self.leak_allowed)
        saved, head = lora.detach(model), getattr(model, HEAD, None)
        trained_head = {} if head is None else {key: value.cpu().clone() for key, value in head.state_dict().items()}
        merged, merge = self.merge_checked(model, task)
        directions = self.features(merged, task)
        record = TaskRecord(
            adapter=saved,
            directions=directions,
            certificate=certificates(protected.extend_bases(self.bases, directions), merge.changes),
            merge_error=merge.error,
            merge_loss=merge.loss,
            head=trained_head,
            surviving_gradient=self._surviving,
        )
        self.keep(record)
        return merged

    def initialise(self, model: nn.Module, task: Task) -> Initialisation:
        """Return the start of every layer's adapter."""
        raise NotImplementedError

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the dominant directions of the task's inputs that no basis covers yet, `[d_in, m]` a layer."""
        raise NotImplementedError

    def new_head(self, model: nn.Module, task: Task) -> nn.Module | None:
        """Return the task's own classifier, if it gets one."""
        return None

    def scales(self) -> dict[str, float]:
        """Return a factor for layers whose update is scaled: here none."""
        return {}

    def add_task(self, record: TaskRecord) -> None:
        self._num_learned += 1
        directions = {name: value.to(self.bases[name].device) for name, value in record.directions.items()}
        self.bases = protected.extend_bases(self.bases, directions)

    def remove_task(self, record: TaskRecord) -> None:
        self.bases = protected.remove_directions(self.bases, record.directions)
        self._num_learned -= 1

    def protected(self) -> dict[str, Tensor]:
        return dict(self.bases)

    def _tell_of_small_ranks(self, ranks: dict[str, int], task: str) -> None:
        """Note once that layers have fewer residual directions than the rank; warn of each that has none any more."""
        smaller = [f"{name} ({found})" for name, found in ranks.items() if 0 < found < self.config.rank]
        if smaller and not self._told_of_smaller:
            self._told_of_smaller = True
            logger.info(
                "task %r: %d of %d layers have fewer directions to learn with than rank %d, and take these, as in later"
                " tasks: %s",
                task, len(smaller), len(ranks), self.config.rank, listed(smaller),
            )  # fmt: skip
        if new := [name for name, found in ranks.items() if found == 0 and name not in self._left_alone]:
            self._left_alone.update(new)
            logger.warning(
                "task %r: %d of %d layers have no residual direction left and are left alone: %s",
                task, len(new), len(ranks), listed(new),
            )  # fmt: skip
