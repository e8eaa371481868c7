"""Statistics of a model on a task: one pass over its batches, in which hooks on layers feed accumulators.

A hook sees what a layer gets and, on the way back, the gradient at what it puts out. So no weight needs a gradient, and
layers may be frozen, quantised, sharded or checkpointed. Nothing is stored on modules, and hooks, modes and gradient
flags are given back even when a batch raises. Several processes each take their share of the batches.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from keeplora.errors import LearningError
from keeplora.layers.distributed import add_up, batches_of, ending_together, total_of
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.module_state import (
    device_of,
    evaluation_mode,
    nothing_requires_grad,
    training_mode_without_dropout,
)
from keeplora.layers.outside_uses import require_no_outside_uses
from keeplora.progress import Track, silent
from keeplora.task import Batch, DeferredGradient, Task


class Accumulator:
    """Adds up one statistic of a layer over all rows that reach it."""

    reads_gradients: ClassVar[bool] = False
    """Whether it needs the gradients at the layer's outputs; if not, layers that get one tensor share it."""
    by_place: ClassVar[bool] = False
    """Whether it gets a whole batch's inputs `[n, ..., d_in]`, padding as zeros, in place of the rows that are real."""

    def __init__(self, total: Tensor | None = None) -> None:
        self.total = total

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        """Add rows `[n, d_in]`, and the gradients `[n, d_out]` of a mean loss of this weight at what they led to."""
        raise NotImplementedError

    def end_batch(self) -> None:
        """Take notice that a batch is over; more than one call of a layer may have come by."""

    def reduce(self) -> None:
        """Add up over all processes, in place."""
        add_up(self.result())

    def result(self) -> Tensor:
        """Return the statistic in float32."""
        assert self.total is not None, "nothing was added"
        return self.total


class ExactGradient(Accumulator):
    """The sum over batches of weight times the gradient of their mean loss, `[d_out, d_in]`."""

    reads_gradients: ClassVar[bool] = True

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        assert output_gradients is not None
        self.result().addmm_(output_gradients.float().T, inputs.float(), alpha=weight)


class SquaredGradient(Accumulator):
    """The sum over batches of the squares of weight times the gradient of their mean loss, `[d_out, d_in]`."""

    reads_gradients: ClassVar[bool] = True

    def __init__(self, total: Tensor) -> None:
        super().__init__(total)
        self._of_batch: Tensor | None = None

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        assert output_gradients is not None
        gradient = output_gradients.float().T @ inputs.float() * weight
        self._of_batch = gradient if self._of_batch is None else self._of_batch.add_(gradient)

    def end_batch(self) -> None:
        if self._of_batch is not None:
            self.result().add_(self._of_batch.square_())
            self._of_batch = None


class InputCovariance(Accumulator):
    """The sum of outer products of all rows, `[d_in, d_in]`."""

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        rows = inputs.float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total = self.total.to(rows.device)  # It may come from a file.
        self.total.addmm_(rows.T, rows)


class BatchMean(Accumulator):
    """Inputs averaged over batches by their place, as the released code does; batches of another shape are left out."""

    by_place: ClassVar[bool] = True
    num_batches = 0

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        if self.total is None:
            self.total = torch.zeros_like(inputs, dtype=torch.float32)
        if inputs.shape == self.total.shape:
            self.total += inputs
            self.num_batches += 1

    def reduce(self) -> None:
        """Do nothing: `KeepLoRA` refuses this statistic where there are several processes."""

    def result(self) -> Tensor:
        rows = super().result().flatten(0, -2) / self.num_batches
        return rows.T @ rows


Accumulators = Mapping[str, Sequence[Accumulator]]
"""Those of each layer, by its name. One may belong to several layers."""


def collect(
    model: nn.Module, task: Task, accumulators: Accumulators, *, share: float = 1.0, track: Track = silent, what: str
) -> "Watcher":
    """Feed accumulators, of all layers or a group of them, with a share of a task's batches, and reduce them.

    With gradients, the model is in training mode without dropout, so that activation checkpointing works; what the task
    keeps frozen is differentiated once, after all batches. What is returned tells the `total_weight` of the batches and
    the `leaders` of the layers. Raises a LearningError if a loss is not finite, and a ValueError if none depends on a
    layer, or one depends on a weight otherwise than through its layer.
    """
    task = Task.of(task)
    watcher = Watcher(task, accumulators)
    layers = {name: model.get_submodule(name) for name in accumulators}
    with ending_together(), ExitStack() as inside:
        mode = training_mode_without_dropout if watcher.reads_gradients else evaluation_mode
        for context in (mode(model), nothing_requires_grad(model), fused_layers(model), watcher.watching(layers)):
            inside.enter_context(context)
        inside.enter_context(torch.set_grad_enabled(watcher.reads_gradients))
        deferred = inside.enter_context(task.frozen(model))
        for batch in batches_of(model, task, share, track, what):
            for part in [batch] if watcher.by_place else task.micro_batches(batch):
                _read(model, part, watcher, deferred)
        for one in deferred:
            watcher.backward(one.surrogate(), [], one.weight)
    if watcher.total_weight and not watcher.was_reached:
        raise ValueError(f"task {task.name!r}: the loss depends on no target layer; is it computed without gradients?")
    watcher.reduce(device_of(model))
    return watcher


def _read(model: nn.Module, batch: Batch, watcher: "Watcher", deferred: Sequence[DeferredGradient]) -> None:
    """Let the model read one micro-batch, forth and, if that is asked for, back."""
    task = watcher.task
    weight = float(task.weight(batch)) if watcher.reads_gradients else 1.0
    if weight == 0:
        return
    with watcher.reading(batch), ExitStack() as inside:
        if watcher.reads_gradients and not watcher.total_weight:  # Checked in the first batch.
            inside.enter_context(require_no_outside_uses(model, watcher.accumulators, watcher.calls, task.name))
        loss = task.loss(model, batch)
    if not watcher.reads_gradients:
        return
    require_finite(loss, f"task {task.name!r}: the loss of a batch is {loss.item()} in the gradient pass")
    watcher.total_weight += weight
    if loss.requires_grad:
        watcher.was_reached = True
        gradients = watcher.backward(loss, [one.leaf for one in deferred], weight)
        for one, gradient in zip(deferred, gradients, strict=True):
            one.add(gradient, weight)


class Watcher:
    """Hands what goes through layers to their accumulators while a model runs.

    `leaders` names for each layer the first one that gets the same tensor, for which what is collected of inputs alone
    is collected. `calls` counts how often each layer ran, with a gradient to come, for the batch read.
    """

    def __init__(self, task: Task, accumulators: Accumulators) -> None:
        self.task = task
        self.accumulators = accumulators
        self.distinct = list({id(one): one for own in accumulators.values() for one in own}.values())
        self.reads_gradients = any(one.reads_gradients for one in self.distinct)
        self.by_place = any(one.by_place for one in self.distinct)
        self.leaders: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.total_weight = 0.0
        self.was_reached = False
        self.is_reading = False
        self._batch: Batch = None
        self._backward_weight: float | None = None  # A backward pass of the loss's own is none of ours.
        self._to_come: Counter[int] = Counter()
        self._seen: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._leaf = torch.zeros((), requires_grad=True)

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch layers by their names; stop when the block ends."""
        handles = []
        try:
            for name, layer in layers.items():
                hook = partial(self._after, name)
                # A row that is left out because nothing depends on it has no gradient.
                vars(hook)["reads_gradients_only"] = all(one.reads_gradients for one in self.accumulators[name])
                # Before any other hook: the gradient is that at what the layer itself puts out.
                handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Say that the model reads a batch inside; what it computes again in a backward pass is not counted."""
        self._batch, self.is_reading = batch, True
        self.calls.clear()
        try:
            yield
        finally:
            self._batch, self.is_reading = None, False
            self._seen.clear()

    def backward(self, loss: Tensor, leaves: list[Tensor], weight: float) -> Sequence[Tensor | None]:
        """Feed the accumulators with the gradients of a mean loss of this weight; return those of the leaves."""
        self._backward_weight = weight
        self._to_come.clear()
        for name, own in self.accumulators.items():
            self._to_come.update({id(one): self.calls[name] for one in own})
        try:
            return torch.autograd.grad(loss, [self._leaf, *leaves], allow_unused=True)[1:]
        finally:
            self._backward_weight = None
            for one in self.distinct:
                one.end_batch()

    def reduce(self, device: torch.device) -> None:
        """Add up over all processes what accumulators and weights of batches hold."""
        self.total_weight = total_of(self.total_weight, device)
        for one in self.distinct:
            if one.reads_gradients:
                one.reduce()
        for name in sorted(set(self.leaders.values())):
            for one in self.accumulators[name]:
                if not one.reads_gradients:
                    one.reduce()

    @torch.no_grad()
    def add_inputs(self, name: str, inputs: Tensor) -> None:
        """Feed the accumulators of a layer that want its inputs alone, unless another layer got the same ones."""
        own = [one for one in self.accumulators[name] if not one.reads_gradients]
        if own and self._leads(name, inputs):
            mask = self._padding_mask(name, inputs)
            for one in own:
                if one.by_place:
                    one.add(inputs if mask is None else inputs.float() * mask.unsqueeze(-1), None, 1.0)
                else:
                    one.add(inputs.flatten(0, -2) if mask is None else inputs[mask], None, 1.0)

    def add_gradients(self, name: str, inputs: Tensor, output_gradients: Tensor) -> None:
        """Feed the accumulators of a layer that want the gradients at its outputs."""
        if self._backward_weight is not None:
            for one in self.accumulators[name]:
                if one.reads_gradients:
                    one.add(inputs.flatten(0, -2), output_gradients.flatten(0, -2), self._backward_weight)
                    self._to_come[id(one)] -= 1
                    if self._to_come[id(one)] == 0:
                        one.end_batch()  # What it holds of the batch goes before the next layer's comes.

    def _after(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """See one call of a layer; return its output so that a backward pass brings the gradient at it."""
        inputs = args[0] if args else kwargs["input"]
        if self.is_reading:
            self.calls[name] += torch.is_grad_enabled()
            self.add_inputs(name, inputs)
        if any(one.reads_gradients for one in self.accumulators[name]):
            return _Meet.apply(output, inputs.detach(), self._leaf, self, name)
        return None

    def _leads(self, name: str, inputs: Tensor) -> bool:
        # Tells a tensor from what was made of it in place.
        version = 0 if inputs.is_inference() else inputs._version
        leader = next((one for ref, v, one in reversed(self._seen) if ref() is inputs and v == version), name)
        if self.leaders.setdefault(name, leader) != leader:
            raise ValueError(
                f"layer {name!r} shared its input with {self.leaders[name]!r} in one batch and with {leader!r} in"
                " another; a model that routes its inputs by their content cannot have these layers as targets"
            )
        if leader == name:
            self._seen.append((weakref.ref(inputs), version, name))
        return leader == name

    def _padding_mask(self, name: str, inputs: Tensor) -> Tensor | None:
        mask = self.task.padding_mask(name, self._batch)
        if mask is not None and mask.shape != inputs.shape[:-1]:
            raise ValueError(
                f"task {self.task.name!r}: padding_mask({name!r}) has shape {tuple(mask.shape)}, the layer's input has"
                f" {tuple(inputs.shape)}; override padding_mask(layer, batch): one flag for each row, or None"
            )
        return None if mask is None else mask.to(inputs.device, torch.bool)


class _Meet(torch.autograd.Function):
    """Lets a layer's output through; on the way back, the gradient at it meets the layer's inputs.

    It hangs on a leaf of ours, so that a backward pass comes by although no weight requires a gradient. What autograd
    saves is the inputs, as for the layer itself, so that checkpoints work; the output is not copied.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, leaf: Tensor, watcher: Watcher, name: str) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.watcher, ctx.name = watcher, name
        return output.detach()  # Not the same object, which could not be changed in place by what comes next.

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                f"task {ctx.watcher.task.name!r}: its loss takes second derivatives, which no statistic sees; give the"
                " method a task whose loss takes none"
            )
        (inputs,) = ctx.saved_tensors
        ctx.watcher.add_gradients(ctx.name, inputs, gradients[0])
        return gradients[0], None, None, None, None


def require_finite(tensor: Tensor, message: str) -> None:
    """Raise a `LearningError` with this message unless a tensor is finite; a mask would take more memory than it."""
    is_whole = tensor.numel() == 0 or not tensor.is_floating_point()
    if not is_whole and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
        raise LearningError(message)
