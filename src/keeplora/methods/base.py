"""The three verbs of a continual-learning method. This base class is sequential LoRA: train, merge, go on.

A method changes what happens in `before_task`, `penalty` and `after_task`. What it carries from task to task it takes
up in `remember`, from the task's record alone, so that a run can be resumed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.config import Config
from keeplora.errors import LearningError
from keeplora.layers import lora
from keeplora.layers.module_state import device_of, evaluation_mode
from keeplora.methods.task_record import TaskRecord
from keeplora.progress import Track, silent
from keeplora.subspace.certificate import LEAK_ALLOWED
from keeplora.task import Task, to_device

Once = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Returns what a phase of a task found, given its name and how to compute it; a run computes it only once."""

HEAD = "task_head"
"""Name under which a task's own classifier joins the adapted model, so that its weights are trained."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Config):
    """What every LoRA method has."""

    rank: int = 16
    """Rank r of each layer's update."""
    alpha: float = 1.0
    """LoRA's alpha; the update is alpha / rank * B A."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
    """Names, or ends of names, of the linear layers to adapt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} leaves nothing to train; set it to at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha = {self.alpha} must be a positive number")
        targets: object = self.targets
        if isinstance(targets, str):
            raise ValueError(f"targets = {targets!r} must be a tuple of names, such as ({targets!r},)")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear layer")


class Method:
    """Sequential LoRA: each task trains a fresh adapter, which is then merged.

    `record` holds what the last finished task left behind. `once` computes a statistic of a task; a run puts another
    function there, which keeps what was found, so that a run that is cut off does not compute it again.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    one_by_one: ClassVar[bool] = True
    """Whether each task is learned from its own data alone; Transfer and forgetting mean nothing otherwise."""

    stands_alone: ClassVar[bool] = True
    """Whether what a task left does not depend on the tasks before it, so that any one can be undone."""

    fixed: ClassVar[tuple[str, ...]] = ("targets",)
    """Options that cannot change in the middle of a stream."""

    has_settings: ClassVar[bool] = True
    """Whether it trains, so that a learning rate has to be chosen for it."""

    def __init__(self, config: MethodConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        self.config = self.Config() if config is None else config
        self.seed = seed
        self.track = track
        self.record = TaskRecord()
        self.once: Once = _compute
        self._learned: list[str] = []
        self._required_grad: dict[str, bool] = {}
        self._fingerprints: dict[str, Tensor] = {}

    def schedule(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return what to learn at each place of a stream: its tasks, one by one."""
        return tasks

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model to train on a task: here a stock PEFT LoRA model, with the same outputs as the given one.

        Raises:
            ValueError: If no layer matches the targets.
        """
        targets = lora.linear_targets(model, self.config.targets)
        self.snapshot(model)
        return lora.attach(model, dict.fromkeys(targets, self.config.rank), dict.fromkeys(targets, self.config.alpha))

    def training_task(self, model: nn.Module, task: Task, epochs: int) -> Task:
        """Return what to train the adapted model on, for so many epochs: the task, here as it is.

        Training asks it for the loss of each batch, or of each of its `parts`, once.
        """
        return task

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return what to add to the loss of every batch, or None for nothing."""
        return None

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge what was learned and return the plain base model.

        Raises:
            ValueError: If the merge changed the outputs or a weight would not be finite.
        """
        saved = lora.detach(model)
        merged, error = self.merge_checked(model, task)
        self.keep(TaskRecord(adapter=saved, merge_error=error))
        return merged

    def add_task(self, record: TaskRecord) -> None:
        """Take up what later tasks need to know of a finished one: here nothing."""

    def keep(self, record: TaskRecord) -> None:
        """Leave a task's record behind, and remember it."""
        self.record = record
        self._take_up(record)

    def _take_up(self, record: TaskRecord) -> None:
        self._learned.append(record.digest())
        self.add_task(record)

    def replay(self, model: nn.Module, record: TaskRecord, folder: Path) -> nn.Module:
        """Redo a finished task from its record and the folder of its adapter; return the merged model."""
        self._take_up(record)
        if record.adapter is None:
            return model
        self.snapshot(model)
        return self.restore(lora.merge_from(model, folder))

    def undo(self, model: nn.Module, record: TaskRecord) -> nn.Module:
        """Take a task out again: its update out of the model's weights, and what it protected out of the method.

        The weights are rounded once: they are the earlier ones within one rounding of their precision. A run directory
        is undone from the base model instead, without any (`keeplora undo`).

        Args:
            model: The merged model, as `after_task` returned it, after this task or a later one.
            record: What `record` was after the task.

        Raises:
            ValueError: If later tasks depend on this one, it is not merged, or it was not learned by this method.
        """
        if not self.stands_alone or not record.merged:
            raise ValueError(f"{type(self).__name__} cannot undo a task: what it learned later depends on it")
        if (learned := record.digest()) not in self._learned:
            raise ValueError("this record is of no task that the method has learned and not undone")
        self._learned.remove(learned)
        self.remove_task(record)
        with torch.no_grad():
            for name, (a, b) in ({} if record.adapter is None else record.adapter.factors()).items():
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(weight.float() - (b @ a).to(weight.device))
        return model

    def remove_task(self, record: TaskRecord) -> None:
        """Undo what `remember` did for a task: here nothing."""

    def protected(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what the next update must stay orthogonal to, `[d_in, k]` a layer; empty if nothing is protected."""
        return {}

    @property
    def leak_allowed(self) -> float:
        """The largest share of an update that may lie inside what is protected; 1 if nothing is promised."""
        return LEAK_ALLOWED

    def snapshot(self, model: nn.Module) -> None:
        """Remember which parameters required a gradient, and what the weights were."""
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._fingerprints = {name: _fingerprint(parameter) for name, parameter in model.named_parameters()}

    def restore(self, model: nn.Module) -> nn.Module:
        """Let the parameters require a gradient as they did before the task."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return model

    def _require_untouched(self, model: nn.Module, task: Task) -> None:
        """Check that training changed the adapter alone: only then does the certificate speak for the weights."""
        for name, parameter in lora.base_parameters(model).items():
            if name in self._fingerprints and not torch.equal(_fingerprint(parameter), self._fingerprints[name]):
                raise ValueError(
                    f"task {task.name!r}: the weight {name!r} of the base model was changed during training; train only"
                    " the parameters that require a gradient after before_task"
                )

    def merge_checked(self, model: nn.Module, task: Task) -> tuple[nn.Module, float]:
        """Merge the adapter; return the base model and the largest change of the outputs for a sample of a batch.

        Raises:
            ValueError: If a weight of the base model was trained, or the merge changed the outputs.
        """
        self._require_untouched(model, task)
        batch = task.sample(to_device(next(iter(task.batches())), device_of(model)))
        # The base model with its adapter inside: a trainer may have left a wrapper of other precision around it.
        before = _outputs(lora.inner(model), task, batch)
        dtype = next(model.parameters()).dtype
        merged = self.restore(lora.merge(model))
        error = float((_outputs(merged, task, batch) - before).abs().max())
        allowed = 4 * math.sqrt(torch.finfo(dtype).eps) * max(1.0, float(before.abs().max()))
        if not math.isfinite(error):
            raise LearningError(f"task {task.name!r}: the trained model's outputs are not finite; lower learning_rate")
        if error > allowed:
            raise LearningError(
                f"task {task.name!r}: merging changed an output by {error:.3g}, more than the {allowed:.3g} that"
                f" {dtype} explains; was the model altered outside the adapter?"
            )
        return merged, error


def _compute(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    return compute()


def _fingerprint(parameter: Tensor) -> Tensor:
    """Return a projection of a parameter that any change of it changes: one number a row."""
    rows = parameter.detach().reshape(len(parameter) if parameter.dim() > 1 else 1, -1).float()
    return rows @ torch.linspace(1.0, 2.0, rows.shape[1], device=rows.device).sin()


def _outputs(model: nn.Module, task: Task, batch: object) -> Tensor:
    with torch.no_grad(), evaluation_mode(model):
        return task.outputs(model, batch).float()
