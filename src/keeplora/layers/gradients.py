"""Gradients of the target weights on a task: exact ones, sketches of them, and what of them lies outside a subspace."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from keeplora.layers import weights
from keeplora.layers.distributed import add_up
from keeplora.layers.module_state import device_of
from keeplora.layers.statistics import Accumulator, Accumulators, ExactGradient, collect, require_finite
from keeplora.progress import Track, silent
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace.gradient_sketch import GradientSketch
from keeplora.task import Task


@dataclass(frozen=True)
class NamedTensors:
    """Base of results whose every field holds, by the layer's name, a tensor or a number."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return every value by its field and name; a number is a tensor without dimensions, in float64."""
        return {
            f"{field.name}/{name}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for field in fields(self)
            for name, value in getattr(self, field.name).items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Return the result that `to_tensors` was called on."""
        values: dict[str, dict[str, Tensor | float]] = {field.name: {} for field in fields(cls)}
        for key, value in tensors.items():
            field, _, name = key.partition("/")
            is_number = value.dim() == 0 and value.dtype == torch.float64
            values[field][name] = value.item() if is_number else value
        return cls(**values)


def mean_gradients(
    model: nn.Module, task: Task, targets: list[str], *, share: float = 1.0, track: Track = silent
) -> dict[str, Tensor]:
    """Average the gradient of the loss with respect to the target weights over a task (G_t, Eq. 4).

    The mean is by `task.weight`, so a smaller last batch weighs less, over a share of the batches, from the first on.
    Returned is for each target the gradient `[d_out, d_in]` in float32; zero where no gradient reached the layer. A
    LearningError says that a loss or a gradient is not finite, a ValueError that there is no batch, or that the loss
    depends on a weight otherwise than through its layer.
    """
    return averages(ExactGradient, model, task, targets, share, track)


def averages(
    kind: Callable[[Tensor], Accumulator], model: nn.Module, task: Task, targets: list[str], share: float, track: Track
) -> dict[str, Tensor]:
    """Average what accumulators of a kind find of each layer's gradients; layers that share a weight share one."""
    found: dict[Tensor, Accumulator] = {}
    for name in targets:
        zeros = torch.zeros(weights.shape_of(model, name), device=device_of(model))
        found.setdefault(model.get_parameter(f"{name}.weight"), kind(zeros))
    own = {name: found[model.get_parameter(f"{name}.weight")] for name in targets}
    total_weight = _collect(model, task, {name: [one] for name, one in own.items()}, share, track)
    for one in found.values():
        one.result().div_(total_weight)
    for name, one in own.items():
        _require_finite_gradient(one.result(), name, task)
    return {name: one.result() for name, one in own.items()}


class SketchedGradient(Accumulator):
    """A sketch of the sum over batches of weight times the gradient of their mean loss."""

    reads_gradients: ClassVar[bool] = True

    def __init__(self, sketch: GradientSketch) -> None:
        super().__init__()
        self.sketch = sketch

    def add(self, inputs: Tensor, output_gradients: Tensor | None, weight: float) -> None:
        assert output_gradients is not None
        self.sketch.add(inputs, output_gradients, weight)

    def reduce(self) -> None:
        add_up(*self.sketch.sums)


def gradient_sketches(
    model: nn.Module, task: Task, sketches: dict[str, GradientSketch], *, share: float = 1.0, track: Track = silent
) -> None:
    """Add the gradient of the loss, summed over a task, to a sketch for each target layer, in place.

    It is the one that `mean_gradients`, which takes and raises the same, averages, times the weight of all batches.
    """
    sharing: dict[Tensor, list[Accumulator]] = {}
    for name, sketch in sketches.items():
        sharing.setdefault(model.get_parameter(f"{name}.weight"), []).append(SketchedGradient(sketch))
    own = {name: sharing[model.get_parameter(f"{name}.weight")] for name in sketches}
    _collect(model, task, own, share, track)
    for name, sketch in sketches.items():
        for picture in sketch.sums:
            _require_finite_gradient(picture, name, task)


@dataclass(frozen=True)
class ResidualGradients(NamedTensors):
    """By layer, what of the gradient on a task lies outside a protected subspace (Eq. 4 and 5, arXiv 2601.19659)."""

    rows: dict[str, Tensor]  # `[n, d_in]`: their leading right singular vectors are those of the residual gradient.
    norms: dict[str, float]  # The norm of the whole gradient, in the scale of the rows.
    surviving: dict[str, float]  # The share of that norm which is left.


def exact_residuals(
    model: nn.Module, task: Task, bases: dict[str, Tensor], rank: int, share: float, track: Track
) -> ResidualGradients:
    """Average the gradient of every layer and project its basis out; the rows are `[d_out, d_in]`."""
    return residuals_of(mean_gradients(model, task, list(bases), share=share, track=track), bases)


def residuals_of(gradients: dict[str, Tensor], bases: dict[str, Tensor]) -> ResidualGradients:
    """Project the basis out of each layer's gradient `[d_out, d_in]`; the dictionary of gradients is emptied."""
    found = ResidualGradients({}, {}, {})
    for name, basis in bases.items():
        gradient = gradients.pop(name)  # Given free at once, so that not all of them are there twice.
        found.rows[name] = linalg.project_out(gradient, basis)
        found.norms[name] = float(gradient.norm())
        found.surviving[name] = linalg.share_of_norm(found.rows[name], gradient)
    return found


def sketched_residuals(
    model: nn.Module, task: Task, bases: dict[str, Tensor], rank: int, share: float, track: Track
) -> ResidualGradients:
    """Sketch the gradient of every layer outside its basis; the rows are `[<= rank, d_in]`, the rest estimates."""
    sketches = {
        name: GradientSketch(weights.shape_of(model, name)[0], basis, rank, seed=seed)
        for seed, (name, basis) in enumerate(bases.items())
    }
    gradient_sketches(model, task, sketches, share=share, track=track)
    found = ResidualGradients({}, {}, {})
    for name in bases:
        sketch = sketches.pop(name)
        s, vh = sketch.top(rank)
        found.rows[name] = s.unsqueeze(1) * vh
        found.norms[name], found.surviving[name] = sketch.norm, sketch.surviving_share
    return found


RESIDUALS = {"exact": exact_residuals, "sketch": sketched_residuals}


def _collect(model: nn.Module, task: Task, own: Accumulators, share: float, track: Track) -> float:
    """Feed the accumulators and return the weight of all batches; there must be one."""
    if (total := collect(model, task, own, share=share, track=track, what="gradient").total_weight) == 0:
        raise ValueError(f"task {task.name!r} gave no batch to take a gradient from")
    return total


def _require_finite_gradient(gradient: Tensor, layer: str, task: Task) -> None:
    require_finite(gradient, f"task {task.name!r}: the gradient of layer {layer!r} is not finite; is the learning rate"
                             " of an earlier task too high, or the precision too low?")  # fmt: skip
