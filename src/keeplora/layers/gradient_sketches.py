"""Sketches of the gradients of the target weights in one pass, without forming any of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from keeplora.layers.distributed import sum_over_processes
from keeplora.layers.gradients import add_gradients
from keeplora.layers.module_state import device_of, only_these_require_grad
from keeplora.layers.statistics import require_finite
from keeplora.progress import Track, silent
from keeplora.subspace.gradient_sketch import GradientSketch
from keeplora.task import Task


def gradient_sketches(
    model: nn.Module, task: Task, sketches: dict[str, GradientSketch], *, share: float = 1.0, track: Track = silent
) -> None:
    """Add the gradient of the loss, summed over a task's examples, to a sketch for each target layer.

    It is the gradient that `collect.mean_gradients` averages, but for the number of examples, on which no direction
    depends. A layer's inputs and the gradient at its outputs meet in the sketch; their product is never made.

    Args:
        model: Any module whose targets are `nn.Linear`.
        task: Gives the batches and the loss.
        sketches: By the target layers' names; they are changed in place.
        share: Use this share of the batches, from the start of `task.batches()`.
        track: Shows progress over the batches.

    Raises:
        ValueError: If there is no batch, if a loss or a gradient is not finite, or if a target shares its weight with
            what is no target. What else a loss takes from a weight, other than through its layer, is not seen.
    """
    _require_whole_weights(model, sketches)
    with only_these_require_grad(model, []), _meeting(model, sketches) as meeting:
        count = add_gradients(model, task, meeting.add, share, track)
    sums = {f"{name}.{side}": part for name, sketch in sketches.items() for side, part in enumerate(sketch.sums)}
    if sum_over_processes(sums, count) == 0:
        raise ValueError(f"task {task.name!r} gave no batch to take a gradient from")
    for name, total in sums.items():
        require_finite(total, f"task {task.name!r}: the gradient of layer {name.rsplit('.', 1)[0]!r} is not finite; is"
                              " the learning rate of an earlier task too high, or the precision too low?")  # fmt: skip


class _Meeting:
    """A leaf that every target's output hangs on, so that a backward pass comes by, and the weight of what it brings.

    No weight needs to require a gradient for it, and autograd makes none.
    """

    def __init__(self, device: torch.device) -> None:
        self.leaf = torch.zeros((), device=device, requires_grad=True)
        self.weight: float | None = None  # A backward pass of the loss's own is none of ours.

    def add(self, loss: Tensor, leaves: list[Tensor], num_examples: int, weight: float) -> tuple[Tensor | None, ...]:
        """GradientSketch the gradients of a loss, times a weight; return those of the leaves."""
        self.weight = weight
        try:
            return torch.autograd.grad(loss, [self.leaf, *leaves], allow_unused=True)[1:]
        finally:
            self.weight = None


class _Meet(torch.autograd.Function):
    """Lets a layer's output through; on the way back, the gradient at it meets the layer's inputs in the sketches.

    Only those of one layer are there at a time. What autograd saves is the inputs, as for the layer itself.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, leaf: Tensor, own: list[GradientSketch], meeting: _Meeting
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.sketches, ctx.meeting = own, meeting
        return output.clone()  # May be changed in place by what comes next.

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError("a loss with second derivatives cannot be sketched; set gradient = 'exact'")
        (delta,) = deltas
        (inputs,) = ctx.saved_tensors
        if ctx.meeting.weight is not None:
            for sketch in ctx.sketches:
                sketch.add(_rows(delta), _rows(inputs), weight=ctx.meeting.weight)
        return delta, None, delta.new_zeros(()), None, None


@contextmanager
def _meeting(model: nn.Module, sketches: dict[str, GradientSketch]) -> Iterator[_Meeting]:
    """Let every layer's inputs and the gradients at its outputs meet in its sketch while a pass goes on.

    Layers that share a weight share what is found of its gradient.
    """
    meeting = _Meeting(device_of(model))
    sharing: dict[nn.Parameter, list[GradientSketch]] = {}
    for name, sketch in sketches.items():
        sharing.setdefault(model.get_parameter(f"{name}.weight"), []).append(sketch)

    def hook(own: list[GradientSketch]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Any]:
        return lambda _, args, output: _Meet.apply(output, args[0].detach(), meeting.leaf, own, meeting)

    layers = [model.get_submodule(name) for name in sketches]
    # Before any other hook: the gradient is that at what the layer itself puts out.
    handles = [layer.register_forward_hook(hook(sharing[cast(Any, layer).weight]), prepend=True) for layer in layers]
    try:
        yield meeting
    finally:
        for handle in handles:
            handle.remove()


def _require_whole_weights(model: nn.Module, sketches: dict[str, GradientSketch]) -> None:
    """Check that no weight of a target is used elsewhere: that part of its gradient would be missed."""
    names = {model.get_parameter(f"{name}.weight"): name for name in sketches}
    for other, weight in model.named_parameters(remove_duplicate=False):
        if weight in names and other.removesuffix(".weight") not in sketches:
            raise ValueError(
                f"layer {names[weight]!r} shares its weight with {other!r}, which is no target: the sketch would miss"
                " that part of the gradient; set gradient = 'exact'"
            )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
