"""Sketches of the gradients of the target weights in one pass, without forming any of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from keeplora.borrow import evaluation_mode, only_these_require_grad
from keeplora.collect import Track, batches_of, require_finite, silent, sum_over_processes
from keeplora.fused import fused_layers
from keeplora.sketch import Sketch
from keeplora.task import Task


def gradient_sketches(
    model: nn.Module, task: Task, sketches: dict[str, Sketch], *, share: float = 1.0, track: Track = silent
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
        ValueError: If there is no batch, or a loss or a gradient is not finite.
    """
    weights = [model.get_parameter(f"{name}.weight") for name in sketches]
    count = 0
    # The weights require a gradient so that the outputs do; autograd is asked for those of the outputs alone.
    with (
        only_these_require_grad(model, weights),
        evaluation_mode(model),
        fused_layers(model),
        _seen(model, list(sketches)) as seen,
    ):
        for batch in batches_of(model, task, share, track, "gradient"):
            loss = task.loss(model, batch)
            require_finite(loss, f"task {task.name!r}: the loss of a batch is {loss.item()} in the gradient pass")
            outputs = [output for _, _, output in seen]
            deltas = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
            num_examples = task.num_examples(batch)
            for (name, inputs, _), delta in zip(seen, deltas, strict=True):
                if delta is not None:
                    sketches[name].add(_rows(delta), _rows(inputs), weight=num_examples)
            seen.clear()
            count += num_examples
    sums = {f"{name}.{side}": part for name, sketch in sketches.items() for side, part in enumerate(sketch.sums)}
    if sum_over_processes(sums, count) == 0:
        raise ValueError(f"task {task.name!r} gave no batch to take a gradient from")
    for name, total in sums.items():
        require_finite(total, f"task {task.name!r}: the gradient of layer {name.rsplit('.', 1)[0]!r} is not finite; is"
                              " the learning rate of an earlier task too high, or the precision too low?")  # fmt: skip


@contextmanager
def _seen(model: nn.Module, names: list[str]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Give a list that gets the name, the input and the output of every call of some layers."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: seen.append((name, args[0].detach(), output))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
