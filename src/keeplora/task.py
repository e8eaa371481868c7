"""A task, examples and a loss, is all that the methods see of a user's problem.

Subclass `Task`, or hand any object with `name`, `batches` and `loss`: nothing in it is about images or text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any


class DeferredGradient:
    """A tensor made once for many batches, and the leaf in its place in their losses: one backward pass for all."""

    def __init__(self, made: Tensor) -> None:
        self.made = made
        self.leaf = made.detach().requires_grad_()
        self.weight = 0.0
        self.gradient = torch.zeros_like(made, dtype=torch.promote_types(made.dtype, torch.float32))

    def add(self, gradient: Tensor | None, weight: float) -> None:
        """Add the gradient of a loss with respect to the leaf."""
        if gradient is not None:
            self.gradient.add_(gradient.to(self.gradient.dtype), alpha=weight)
            self.weight += weight

    def take(self) -> None:
        """Add what a backward pass has left at the leaf."""
        self.add(self.leaf.grad, 1.0)
        self.leaf.grad = None

    def backward(self) -> None:
        """Send what was added on to what lies behind."""
        if self.weight:
            torch.autograd.backward(self.made, self.gradient.to(self.made.dtype))

    def surrogate(self) -> Tensor:
        """Return a scalar whose gradients are the weighted mean of what the losses' would have been."""
        return (self.made * (self.gradient / (self.weight or 1.0)).to(self.made.dtype)).sum()


class Task:
    """One task of a stream. A subclass gives `batches` and `loss`; the rest has defaults."""

    name: str

    @staticmethod
    def of(task: Any) -> "Task":
        """Return a task as it is, or one that takes what a plain object has: a name, `batches`, `loss` at least."""
        if isinstance(task, Task):
            return task
        if missing := [name for name in ("name", "batches", "loss") if not hasattr(task, name)]:
            raise ValueError(f"{task!r} is no task: it has no {missing[0]}; a task has name, batches() and loss(...)")
        return TaskLike(task)

    def batches(self) -> Iterable[Batch]:
        """Return the training batches, in an order of your choice; a sized iterable if a share of them is asked for."""
        raise NotImplementedError(f"{type(self).__name__} must define batches()")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch as a scalar: a mean, over its examples unless `weight` says otherwise."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch)")

    def weight(self, batch: Batch) -> float:
        """Return of how much the loss of a batch is the mean: its examples, or answer tokens, say.

        Gradients and losses of batches combine by it. Unless overridden, it is the length of the first tensor.
        """
        return length_of(batch, self)

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Say which rows of a layer's input are real, shaped as the input less d_in: true for real, false for padding.

        Unless overridden, it is the batch's `attention_mask`, if the batch is a mapping that has one; None means that
        all rows are real. Padding rows never enter the statistics.
        """
        return batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def start_head(self, model: nn.Module) -> nn.Module:
        """Make the task's own classifier for KeepLoRA+, and use it in `loss` from now on."""
        raise ValueError(f"task {self.name!r} has no classes to build a classifier from; set classifier='none'")

    def load_head(self, weights: dict[str, Tensor]) -> nn.Module:
        """Make the task's own classifier from saved weights, and use it in `loss` from now on."""
        raise ValueError(f"task {self.name!r} has a classifier, but no load_head(weights) to take it up again")

    def generators(self) -> tuple[torch.Generator, ...]:
        """Return what the order of the batches is drawn from, other than torch's own generator."""
        return ()

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        """Return the batches that one may be cut into, so that its loss is the mean of theirs by `weight`.

        Read by gradients, second moments, evaluation, and training where one process trains a model as it is.
        """
        return [batch]

    def sample(self, batch: Batch) -> Batch:
        """Return what of a batch the merge check reads: its first micro-batch, unless overridden."""
        return next(iter(self.micro_batches(batch)))

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        """Promise that the weights stay as they are inside: a task may keep what depends on them alone.

        What it keeps with a gradient it hands out, at any time inside, as a deferred gradient, and uses its leaf.
        """
        yield ()


class TaskLike(Task):
    """A task that takes what it does not define itself from another object, and the defaults for the rest."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.name = task.name
        for name in dir(Task):
            is_own = getattr(type(self), name) is not getattr(Task, name)
            if not (name.startswith("_") or is_own) and name != "of" and hasattr(task, name):
                setattr(self, name, getattr(task, name))


def length_of(batch: Batch, task: Task) -> int:
    """Return how many examples a batch holds: the length of the first tensor in it; there must be one."""
    for value in _leaves(batch):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(f"task {task.name!r}: a batch holds no tensor; override weight(batch)")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch to a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Change every tensor of a batch, nested in mappings, lists or tuples."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(change, value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        changed = [map_tensors(change, value) for value in batch]
        return type(batch)(*changed) if hasattr(batch, "_fields") else type(batch)(changed)
    return batch


def _leaves(batch: Batch) -> Iterator[Any]:
    if isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(value)
    else:
        yield batch
