"""Statistics of a model on a task: mean gradients of the target weights, and second moments of their inputs.

Nothing is stored on modules, and whatever is borrowed (hooks, `requires_grad`, the training mode) is given back even
when a batch raises. Several processes each take their share of the batches and add up what they found.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from keeplora.layers.distributed import batches_of, sum_over_processes
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.module_state import evaluation_mode, only_these_require_grad
from keeplora.layers.statistics import require_finite
from keeplora.progress import Track, silent
from keeplora.task import Task

Statistic = Callable[[Tensor, int], Tensor]
"""Makes a statistic `[d_out, d_in]` of the gradient of a mean loss and the number of examples it is the mean of."""


def mean_gradients(
    model: nn.Module, task: Task, targets: list[str], *, share: float = 1.0, track: Track = silent
) -> dict[str, Tensor]:
    """Average the gradient of the loss with respect to the target weights over a task's examples (G_t, Eq. 4).

    Only the targets get a gradient. The mean is over examples, so a smaller last batch weighs less.

    Args:
        model: Any module whose targets are `nn.Linear`.
        task: Gives the batches and the loss.
        targets: Module names of the target layers.
        share: Use this share of the batches, from the start of `task.batches()`.
        track: Shows progress over the batches.

    Returns:
        For each target the gradient `[d_out, d_in]` in float32; zero where no gradient reached the layer.

    Raises:
        ValueError: If there is no batch, or if a loss or a gradient is not finite.
    """
    return mean_over_examples(model, task, targets, lambda gradient, _: gradient, share=share, track=track)


def mean_over_examples(
    model: nn.Module, task: Task, targets: list[str], statistic: Statistic, *, share: float = 1.0, track: Track = silent
) -> dict[str, Tensor]:
    """Average a statistic of each batch's gradient over a task's examples, as `mean_gradients` does the gradient.

    Takes, returns and raises what `mean_gradients` does; `statistic` is asked for every part of a batch and target. One
    that is not linear in the gradient needs a task that cuts batches as it means to, and keeps nothing frozen.
    """
    weights = {name: model.get_parameter(f"{name}.weight") for name in targets}
    sums = GradientSums(weights, statistic)
    with only_these_require_grad(model, list(weights.values())):
        count = add_gradients(model, task, sums.add, share, track)
    count = sum_over_processes(sums.totals, count)
    if count == 0:
        raise ValueError(f"task {task.name!r} gave no batch to take a gradient from")
    for name, total in sums.totals.items():
        require_finite(total, f"task {task.name!r}: the gradient of layer {name!r} is not finite; is the learning rate"
                               " of an earlier task too high, or the precision too low?")  # fmt: skip
        total.div_(count)
    return sums.totals


AddGradient = Callable[[Tensor, list[Tensor], int, float], tuple[Tensor | None, ...]]
"""Takes a mean loss, leaves, of how many examples it is the mean, and its weight; uses the loss's gradient with respect
to what it is after, and returns that with respect to the leaves."""


def add_gradients(model: nn.Module, task: Task, add: AddGradient, share: float, track: Track) -> int:
    """Hand the loss of every part of a share of a task's batches to `add`; return the number of examples.

    What the task keeps frozen is differentiated once, after all of them.

    Raises:
        LearningError: If a loss is not finite.
        ValueError: If no loss depends on what requires a gradient.
    """
    count, reached = 0, False
    with evaluation_mode(model), fused_layers(model), task.frozen(model) as deferred:
        for batch in batches_of(model, task, share, track, "gradient"):
            for part in task.micro_batches(batch):
                num_examples = task.weight(part)
                if num_examples == 0:
                    continue
                loss = task.loss(model, part)
                require_finite(loss, f"task {task.name!r}: the loss of a batch is {loss.item()} in the gradient pass")
                count += num_examples
                if not loss.requires_grad:
                    continue
                reached = True
                gradients = add(loss, [one.leaf for one in deferred], num_examples, num_examples)
                for one, gradient in zip(deferred, gradients, strict=True):
                    one.add(gradient, num_examples)
        for one in deferred:
            add(one.surrogate(), [], count, one.weight)
    if count and not reached:
        raise ValueError(
            f"task {task.name!r}: the loss depends on no target layer when the model is in evaluation mode, in which"
            " the gradient pass runs; is it computed without gradients there?"
        )
    return count


class GradientSums:
    """Sums of a statistic of each weight's gradients. A gradient is let go of before the next weight's is made."""

    def __init__(self, weights: dict[str, nn.Parameter], statistic: Statistic) -> None:
        self.totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        self._sharing: dict[nn.Parameter, list[Tensor]] = {}
        for name, weight in weights.items():
            self._sharing.setdefault(weight, []).append(self.totals[name])
        self._statistic = statistic

    def add(self, loss: Tensor, leaves: list[Tensor], num_examples: int, weight: float) -> tuple[Tensor | None, ...]:
        """Add the statistic of the gradients of a mean over so many examples; return those of the leaves."""
        take = partial(self._take, num_examples, weight)
        # Only now: a loss may itself differentiate with respect to a weight.
        hooks = [shared.register_hook(partial(take, totals)) for shared, totals in self._sharing.items()]
        try:
            return torch.autograd.grad(loss, [*self._sharing, *leaves], allow_unused=True)[len(self._sharing) :]
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, num_examples: int, weight: float, totals: list[Tensor], gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        found = self._statistic(gradient, num_examples)
        for total in totals:
            total.add_(found, alpha=weight)
        return gradient.new_zeros(()).expand_as(gradient)  # What autograd keeps until its pass ends takes no memory.
