"""Of each layer's gradient on a task, the part outside a protected subspace: exactly, or by a sketch in one pass.

Both give, for every layer, `.residual`: rows `[n, d_in]` whose leading right singular vectors are those of the residual
gradient (Eq. 4 and 5 of the KeepLoRA paper, arXiv 2601.19659); `.norm`: the norm of the whole gradient, in the scale of
the rows; `.survives`: the share of it that is left.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from keeplora.layers import gradients as collect
from keeplora.layers.gradient_sketches import gradient_sketches
from keeplora.progress import Track
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace.certificate import share_of_norm
from keeplora.subspace.gradient_sketch import GradientSketch
from keeplora.task import Task

Residuals = Callable[[nn.Module, Task, dict[str, Tensor], int, float, Track], dict[str, Tensor]]


def exact_residuals(
    model: nn.Module, task: Task, bases: dict[str, Tensor], rank: int, share: float, track: Track
) -> dict[str, Tensor]:
    """Average the gradient of every layer and project its basis out; `.residual` is `[d_out, d_in]`."""
    return residuals_of(collect.mean_gradients(model, task, list(bases), share=share, track=track), bases)


def residuals_of(gradients: dict[str, Tensor], bases: dict[str, Tensor]) -> dict[str, Tensor]:
    """Project the basis out of each layer's gradient `[d_out, d_in]`; the dictionary of gradients is emptied."""
    found = {}
    for name, basis in bases.items():
        gradient = gradients.pop(name)  # Given free at once, so that not all of them are there twice.
        residual = linalg.project_out(gradient, basis)
        found[f"{name}.residual"] = residual
        found[f"{name}.norm"] = gradient.norm().double()
        found[f"{name}.survives"] = torch.tensor(share_of_norm(residual, gradient), dtype=torch.float64)
    return found


def sketched_residuals(
    model: nn.Module, task: Task, bases: dict[str, Tensor], rank: int, share: float, track: Track
) -> dict[str, Tensor]:
    """Sketch the gradient of every layer outside its basis; `.residual` is `[<= rank, d_in]`, the rest estimates."""
    d_outs = {name: len(model.get_parameter(f"{name}.weight")) for name in bases}
    sketches = {
        name: GradientSketch(d_outs[name], basis, rank, seed=seed) for seed, (name, basis) in enumerate(bases.items())
    }
    gradient_sketches(model, task, sketches, share=share, track=track)
    found = {}
    for name in bases:
        sketch = sketches.pop(name)
        s, vh = sketch.top(rank)
        found[f"{name}.residual"] = s.unsqueeze(1) * vh
        found[f"{name}.norm"] = torch.tensor(sketch.norm, dtype=torch.float64)
        found[f"{name}.survives"] = torch.tensor(sketch.surviving_share, dtype=torch.float64)
    return found


RESIDUALS: dict[str, Residuals] = {"exact": exact_residuals, "sketch": sketched_residuals}
