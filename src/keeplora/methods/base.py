"""The three verbs of a continual-learning method. This base class is sequential LoRA: train, merge, next.

What a method carries from task to task it takes up in `add_task`, from a task's record alone, so that runs resume.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from keeplora.config import Config, PositiveNumber
from keeplora.errors import LearningError
from keeplora.layers import lora, merging, weights
from keeplora.layers.beside import beside, remove_beside
from keeplora.layers.lora import SavedAdapter
from keeplora.layers.module_state import device_of, evaluation_mode
from keeplora.layers.names import AUTO
from keeplora.progress import Track, silent
from keeplora.subspace.certificate import LEAK_ALLOWED, LayerCertificate
from keeplora.task import Task, to_device

HEAD = "task_head"  # Name under which a task's own classifier joins the adapted model, so that its weights are trained.


ABLATION: dict[str, Any] = {"ablation": True}  # Metadata of an option that a comparison needs, and no other user.


class Step(NamedTuple):
    """A costly step of a task: a method of the class, from a model and a task to a result."""

    name: str
    kind: type[Any] = dict  # What it returns: a dictionary of tensors, or a class of `NamedTensors`.
    supersedes: str = ""  # An earlier step whose result nobody needs once this one has its own.


@dataclass(frozen=True)
class TaskRecord:
    """What a method leaves behind after a task: all that is needed to replay it."""

    adapter: SavedAdapter | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)
    """The directions `[d_in, k]` that the task added to each layer's protected subspace."""
    certificate: dict[str, LayerCertificate] = field(default_factory=dict)
    merge_error: float = 0.0
    """Difference of what layers compute before and after the merge, relative to what the update changes."""
    merge_loss: float = 0.0  # What of the update, over all layers, rounding kept out of the weights.
    head: dict[str, Tensor] = field(default_factory=dict)  # Weights of the task's own classifier, if it has one.
    state: dict[str, Tensor] = field(default_factory=dict)  # What else later tasks, or inference, need of this one.
    merged: bool = True
    """Whether the adapter went into the weights; otherwise it stays beside them at inference, with `state`."""
    surviving_gradient: dict[str, float] = field(default_factory=dict)
    """The share of each layer's gradient norm that the protected subspace left to learn from."""

    @property
    def added_parameters(self) -> int:
        """How many parameters the task adds at inference: its head, and what was not merged."""
        beside = [] if self.merged or self.adapter is None else [*self.adapter.weights.values(), *self.state.values()]
        return sum(tensor.numel() for tensor in [*self.head.values(), *beside])

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors `(a, scaling * b)` of every layer's update, in float32."""
        return {} if self.adapter is None else self.adapter.factors()

    def whole_digest(self) -> str:
        """Return a hash of everything that the task left."""
        parts = {"adapter": {} if self.adapter is None else self.adapter.weights, "directions": self.directions}
        parts |= {"head": self.head, "state": self.state}
        return weights.digest_of((f"{part}/{key}", own[key]) for part, own in parts.items() for key in sorted(own))

    def digest(self) -> str:
        """Return a hash of the update that the task left."""
        return weights.digest_of(sorted(({} if self.adapter is None else self.adapter.weights).items()))


Tower = Literal["auto", "vision", "text", "language", "projector"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Config):
    """What every LoRA method has."""

    rank: PositiveInt = 16
    """Rank r of each layer's update."""
    alpha: PositiveNumber = 1.0
    """LoRA's alpha; the update is alpha / rank * B A."""
    targets: tuple[str, ...] = (AUTO,)
    """Names, or ends of names, of the linear layers to adapt; auto: the attention projections of a dual encoder, all
    linear layers of a language model's blocks."""
    towers: tuple[Tower, ...] = ("auto",)
    """Parts of the model whose layers may be targets; auto: the language model if there is one, else all."""
    updates: Literal["auto", "merged", "beside"] = "auto"
    """Where finished updates go: into the weights, or beside them in float32; auto: beside weights of half precision
    or 4 bits, which would lose most of a small update."""
    allow_merge_loss: bool = False
    """Merge even where the precision of the weights (half precision) loses more than 5 % of the update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear layer")


class Method:
    """Sequential LoRA; `record` is what the last task left, `layers` are the adapted ones while a task is learned."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    steps: ClassVar[tuple[Step, ...]] = ()
    """The costly steps of `before_task` and `after_task`; a run keeps what each of them found."""
    one_by_one: ClassVar[bool] = True
    """Whether each task is learned from its own data alone; Transfer and forgetting mean nothing otherwise."""
    stands_alone: ClassVar[bool] = True
    """Whether what a task left does not depend on the tasks before it, so that any one can be undone."""
    fixed: ClassVar[tuple[str, ...]] = ("targets", "towers", "updates")
    """Options that cannot change in the middle of a stream."""
    has_settings: ClassVar[bool] = True  # Whether it trains, so that a learning rate has to be chosen for it.

    def __init__(self, config: MethodConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        self.config = self.Config() if config is None else config
        self.seed = seed
        self.track = track
        self.record = TaskRecord()
        self.layers: dict[str, Any] = {}
        self._learned: list[str] = []
        self._required_grad: dict[str, bool] = {}
        self._fingerprints: dict[str, bytes] = {}
        self.start()

    def start(self) -> None:
        """Begin with what a method knows before the first task: here nothing."""

    def schedule(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return what to learn at each place of a stream: its tasks, one by one."""
        return tasks

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model to train on a task: here a stock PEFT LoRA model, with the same outputs as the given one.

        A LearningError says that nothing is left to learn with, or a statistic is not finite, a ValueError that no
        layer matches the targets, one shares its weight, or the model has an adapter already.
        """
        return self.attach(model, dict.fromkeys(self.targets_of(model), self.config.rank))

    def training_task(self, model: nn.Module, task: Task, epochs: int) -> Task:
        """Return what to train the adapted model on, for so many epochs, batch by batch or by `micro_batches`."""
        return task

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return what to add to the loss of every batch, or None for nothing."""
        return None

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge what was learned and return the plain base model.

        A LearningError says that a merged weight, or the merged model's loss, is not finite, or the merge went wrong, a
        ValueError that a weight of the base model was trained, or the update left its subspace.
        """
        saved = lora.detach(model)
        merged, merge = self.merge_checked(model, task)
        self.keep(TaskRecord(adapter=saved, merge_error=merge.error, merge_loss=merge.loss))
        return merged

    def abandon(self, adapted: nn.Module) -> nn.Module:
        """Give back the model as it was before the task: `adapted` is what `before_task` returned, trained or not."""
        return self.restore(lora.unload(adapted))

    def add_task(self, record: TaskRecord) -> None:
        """Take up what later tasks need to know of a finished one: here nothing."""

    def remove_task(self, record: TaskRecord) -> None:
        """Undo what `add_task` did for a task: here nothing."""

    def protect(self, model: nn.Module) -> None:
        """Protect what the untouched model knows: here nothing. Asked for once, before the first task."""

    def protected(self) -> dict[str, Tensor]:
        """Return what the next update must stay orthogonal to, `[d_in, k]` a layer; empty if nothing is protected."""
        return {}

    @property
    def leak_allowed(self) -> float:
        """The largest share of an update that may lie inside what is protected; 1 if nothing is promised."""
        return LEAK_ALLOWED

    def keep(self, record: TaskRecord) -> None:
        """Leave a task's record behind, and take it up."""
        self.record = record
        self._learned.append(record.digest())
        self.add_task(record)

    def replay(self, model: nn.Module, record: TaskRecord, folder: Path) -> nn.Module:
        """Redo a finished task from its record and the folder of its adapter; return the merged model."""
        self.protect(model)
        self.keep(record)
        return model if record.adapter is None else self.with_updates(model, record, folder)

    def with_updates(self, model: nn.Module, record: TaskRecord, folder: Path) -> nn.Module:
        """Return the model with the updates of a finished task, from its record and the folder of its adapter."""
        self.snapshot(model)
        settle = merging.put_beside if self.keeps_beside(model, record.factors()) else merging.merge
        return self.restore(settle(lora.reload(model, folder)))

    def undo(self, model: nn.Module, record: TaskRecord) -> nn.Module:
        """Take a task out again: its update out of the model's weights, and what it protected out of the method.

        `model` is as `after_task` returned it, after this task or a later one; `record` is what it was after the task.
        The weights are the earlier ones within one rounding; `keeplora undo` makes a run's anew, without any. A
        ValueError says that later tasks depend on it, it is not merged, or it was not learned by this method.
        """
        if not self.stands_alone or not record.merged:
            raise ValueError(f"{type(self).__name__} cannot undo a task: what it learned later depends on it")
        if (learned := record.digest()) not in self._learned:
            raise ValueError("this record is of no task that the method has learned and not undone")
        self._learned.remove(learned)
        self.remove_task(record)
        updates = record.factors()
        is_beside = self.keeps_beside(model, updates)
        for name, (a, b) in updates.items():
            if is_beside:
                remove_beside(model, name, a, b)
            else:
                weights.add_update(model, name, -(b @ a))
        return model

    def keeps_beside(self, model: nn.Module, layers: Iterable[str]) -> bool:
        """Say whether updates of these layers stay beside the weights of a model."""
        coarse = [name for name in layers if not weights.takes_updates(model, name)]
        if self.config.updates != "merged":
            return self.config.updates == "beside" or bool(coarse)
        if whole := [name for name in coarse if weights.is_quantised(model.get_submodule(name))]:
            raise ValueError(f"updates = 'merged': layer {whole[0]!r} has a weight of 4 bits, which takes none")
        return False

    def learned_weight(self, model: nn.Module, layer: str) -> Tensor:
        """Return what of a layer changes when a task is learned, `[d_out, d_in]`: its weight, or what is beside it."""
        if not self.keeps_beside(model, [layer]):
            return weights.read_weight(model, layer)
        shape, device = weights.shape_of(model, layer), device_of(model)
        updates = beside(model.get_submodule(layer)).get("", [])
        start = torch.zeros(shape, device=device)
        return sum((b.to(device) @ a.to(device) for a, b in updates), start)

    def targets_of(self, model: nn.Module) -> list[str]:
        """Return the layers to adapt, of a model without an adapter, each the only owner of its weight, or raise."""
        lora.require_unadapted(model)
        targets = lora.linear_targets(model, self.config.targets, self.config.towers)
        weights.require_own_weights(model, targets)
        return targets

    def attach(
        self,
        model: nn.Module,
        ranks: dict[str, int],
        *,
        factors: dict[str, tuple[Tensor, Tensor]] | None = None,
        scales: dict[str, float] | None = None,
    ) -> nn.Module:
        """Return the model with an adapter in each layer, its scaling alpha / rank as configured whatever its rank.

        `factors` are start values `(a [r, d_in], b [d_out, r])`, with `a` frozen; `scales` further factors of updates.
        """
        self.snapshot(model)
        r, alpha, scales = self.config.rank, self.config.alpha, scales or {}
        alphas = {name: (alpha if n == r else alpha * n / r) * scales.get(name, 1.0) for name, n in ranks.items()}
        adapted = lora.attach(model, ranks, alphas, factors=factors)
        self.layers = dict(lora.lora_layers(adapted))
        return adapted

    def snapshot(self, model: nn.Module) -> None:
        """Remember which parameters required a gradient, and what the weights were."""
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._fingerprints = weights.fingerprints(model)

    def restore(self, model: nn.Module) -> nn.Module:
        """Let the parameters require a gradient as they did before the task."""
        self.layers = {}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        return model

    def require_untouched(self, adapted: nn.Module, task: Task) -> None:
        """Check that training changed the adapter alone: only then does the certificate speak for the weights."""
        found = {lora.base_name(name): value for name, value in weights.fingerprints(lora.inner(adapted)).items()}
        for name, fingerprint in self._fingerprints.items():
            if found[name] != fingerprint:
                raise ValueError(
                    f"task {task.name!r}: the weight {name!r} of the base model was changed during training; train only"
                    " the parameters that require a gradient after before_task"
                )

    def merge_checked(self, adapted: nn.Module, task: Task) -> tuple[nn.Module, merging.Merge]:
        """Merge the adapter, or lay its updates beside the weights; return the base model, and what that did."""
        task = Task.of(task)
        self.require_untouched(adapted, task)
        if self.keeps_beside(lora.inner(adapted), lora.lora_layers(adapted)):
            merged, merge = merging.lay_beside(adapted, task.name, self.protected())
        else:
            allow_loss = self.config.allow_merge_loss
            merged, merge = merging.merge_checked(adapted, task.name, self.protected(), allow_loss=allow_loss)
        self.restore(merged)
        batch = task.sample(to_device(next(iter(task.batches())), device_of(merged)))
        with torch.no_grad(), evaluation_mode(merged):
            if not torch.isfinite(task.loss(merged, batch)):
                raise LearningError(f"task {task.name!r}: the trained model's loss is not finite; lower learning_rate")
        return merged, merge
