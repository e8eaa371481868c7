"""One task's optimisation by `accelerate`, of whatever requires a gradient. The only importer of that library."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from keeplora.config import Config, NonNegative, PositiveNumber
from keeplora.errors import LearningError
from keeplora.layers.distributed import texts_of, total_of
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.module_state import is_wrapped
from keeplora.progress import Track, silent
from keeplora.task import Task, to_device
from keeplora.training.checkpoints import Checkpoints, TrainingState


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How each task is optimised; the defaults are the paper's for MTIL."""

    epochs: PositiveInt = 10
    """Passes over the training images of each task."""
    batch_size: PositiveInt = 64
    """Images in a batch, on each process."""
    learning_rate: PositiveNumber = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.01
    """Decay of AdamW; it acts on trained parameters only."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """Learning rate over a task's steps."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the rate of `cosine` and `constant` rises."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward and backward pass; the statistics stay in float32."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are added up before a step."""


def seed_everything(seed: int) -> None:
    """Seed every generator that training draws from."""
    set_seed(seed)


def best_device() -> torch.device:
    """Return the device that training will use, and meet the other processes if there are any."""
    return torch.device(_accelerator("no").device)


def fit(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    penalty: Callable[[nn.Module], Tensor | None] = lambda model: None,
    track: Track = silent,
    checkpoints: Checkpoints | None = None,
) -> list[float]:
    """Minimise a task's loss plus a penalty over the parameters that require a gradient; return each epoch's mean loss.

    The loss of a step is the mean over its batches, on all processes, by `task.weight`, and over their micro-batches in
    a single process. `penalty` gives what to add to each batch's, or None; `checkpoints` says what to resume from, and
    what happens to further ones. Raises a LearningError if a loss or a gradient is not finite, and a ValueError if
    `batches()` has no length.
    """
    task = Task.of(task)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return []
    accelerator: Any = _accelerator(config.mixed_precision)
    batches = task.batches()
    if not isinstance(batches, Sized):
        raise ValueError(f"task {task.name!r}: training needs the number of batches; let batches() return a DataLoader")
    if len(batches) == 0:
        raise ValueError(f"task {task.name!r} has no training batch")
    batches = accelerator.prepare(batches) if isinstance(batches, DataLoader) else batches
    steps = config.epochs * math.ceil(len(batches) / config.accumulation)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer.zero_grad()  # A training that was cut off may have left something.
    scheduler = _schedule(optimizer, config, steps)
    with fused_layers(model), _prepared(accelerator, model) as prepared:
        optimizer = accelerator.prepare(optimizer)
        parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler}
        state = TrainingState(checkpoints or Checkpoints(), model, parts, config.epochs)
        step = _Step(accelerator, prepared, optimizer, scheduler, task, penalty, config.accumulation)
        for epoch in range(len(state.losses), config.epochs):
            rest = state.rest_of_epoch(batches, lambda n: accelerator.skip_first_batches(batches, n))
            step.epoch(rest, len(batches), state, track, f"{task.name}: epoch {epoch + 1}/{config.epochs}")
        return state.losses


@dataclass(frozen=True)
class _Step:
    """What one optimisation step needs, tied together."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    scheduler: LRScheduler
    task: Task
    penalty: Callable[[nn.Module], Tensor | None]
    accumulation: int
    flaws: list[str] = field(default_factory=list)  # What this process found wrong, where others wait for it.

    def epoch(self, rest: Iterable[Any], total: int, state: TrainingState, track: Track, description: str) -> None:
        """Go through what is left of an epoch of so many batches, a group of them for each step."""
        done = len(state.of_epoch)
        batches = iter(track(rest, description, total - done))
        while done < total:
            group = list(itertools.islice(batches, min(self.accumulation, total - done)))  # The last may be smaller.
            shares = self._shares([to_device(batch, self.accelerator.device) for batch in group])
            for number, (batch, weight, share) in enumerate(shares, done + 1):
                name = f"{description}, batch {number}"
                with nullcontext() if number == done + len(group) else self.accelerator.no_sync(self.model):
                    state.of_epoch.append((self._backward(batch, name, share), weight))
            done += len(group)
            self._agree()
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            # A scaler expects overflow: it skips the step and lowers the scale.
            if self.accelerator.scaler is None and not torch.isfinite(nn.utils.get_total_norm(gradients)):
                raise LearningError(f"{name}: the gradient is not finite. Lower learning_rate; finished tasks are kept")
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            state.after_step(is_last=done == total)

    def _agree(self) -> None:
        """End the training of all processes with what one found: alone, it would let the others wait for ever."""
        if self.accelerator.num_processes > 1 and total_of(len(self.flaws), self.accelerator.device) > 0:
            raise LearningError(texts_of("".join(self.flaws[:1]))[0])

    def _shares(self, group: list[Any]) -> list[tuple[Any, float, float]]:
        """Return each batch of a step, its weight, and its share of the loss: by the mean over processes of all."""
        weights = [float(self.task.weight(batch)) for batch in group]
        # Gradients of processes are averaged, not added up.
        total = total_of(sum(weights), self.accelerator.device) / self.accelerator.num_processes
        if total <= 0:
            raise ValueError(f"task {self.task.name!r}: the batches of a step have no weight; leave out what is empty")
        return [(batch, weight, weight / total) for batch, weight in zip(group, weights, strict=True)]

    def _backward(self, batch: Any, name: str, share: float) -> float:
        """Add a batch's share of the gradient of its step, and return the batch's loss.

        One micro-batch goes after the other: what the backward pass needs is kept of a single one. What stands around a
        model wants to be called once for a batch.
        """
        if share == 0:
            return 0.0  # An empty batch has no loss.
        is_bare = self.accelerator.distributed_type == DistributedType.NO and not is_wrapped(self.model)
        micro_batches = list(self.task.micro_batches(batch)) if is_bare else []
        if len(micro_batches) < 2:
            with self.accelerator.autocast():
                loss = self.task.loss(self.model, batch)
                extra = self.penalty(self.model)
            return self._add(loss if extra is None else loss + extra, name, share)
        weights = [float(self.task.weight(one)) for one in micro_batches]
        value = 0.0
        with self.task.frozen(self.model) as deferred_gradients:
            for micro_batch, weight in zip(micro_batches, weights, strict=True):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.model, micro_batch)
                if weight:
                    value += weight / sum(weights) * self._add(loss, name, share * weight / sum(weights))
                for deferred in deferred_gradients:
                    deferred.take()  # With the loss's weight, and the scaler's scale, in it.
            for deferred in deferred_gradients:
                deferred.backward()
        with self.accelerator.autocast():
            extra = self.penalty(self.model)
        if extra is None:
            return value
        return value + (self._add(extra, name, share) if extra.requires_grad else float(extra))

    def _add(self, loss: Tensor, name: str, share: float) -> float:
        """Add a share of the gradient of a loss; return the loss."""
        value = float(loss.detach())
        if not math.isfinite(value):
            cure = "Lower learning_rate, or set mixed_precision to no; finished tasks are kept"
            self.flaws.append(f"{name}: the loss is {value}. {cure}")
            if self.accelerator.num_processes == 1:
                raise LearningError(self.flaws[0])
        self.accelerator.backward(loss if share == 1 else loss * share)
        return value


def _accelerator(precision: str) -> Accelerator:
    """Make an accelerator; accelerate keeps the precision of a process's first one until its state is reset."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    started = max(int(os.environ.get("WORLD_SIZE", "1")), dist.get_world_size() if dist.is_initialized() else 1)
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, and accelerate takes part in {accelerator.num_processes}: each would"
            " train alone. Without GPUs, set ACCELERATE_USE_CPU=true, or start with accelerate launch --cpu"
        )
    return accelerator


@contextmanager
def _prepared(accelerator: Any, model: nn.Module) -> Iterator[nn.Module]:
    """Lend a model to accelerate in training mode; take off its wrappers and give back the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    prepared = accelerator.prepare(model.train())
    try:
        yield prepared
    finally:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        for module, training in modes.items():
            module.training = training


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    if steps == 1:  # Either schedule would spend its only step at the end of the cycle, at a rate of nearly zero.
        return LambdaLR(optimizer, lambda step: 1.0)
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, max_lr=config.learning_rate, total_steps=steps)
    warmup = config.warmup * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))

    return LambdaLR(optimizer, factor)
