"""The diagonal of the Fisher information of a model's weights on a task: how much each weight matters to it."""

from torch import Tensor, nn

from keeplora.collect import Track, mean_over_examples, silent
from keeplora.task import Task


def fisher_diagonals(model: nn.Module, task: Task, targets: list[str], *, track: Track = silent) -> dict[str, Tensor]:
    """Estimate the diagonal of the empirical Fisher information of the target weights from one gradient pass.

    The estimate is the mean over batches, each weighted by its examples, of `n * gradient ** 2`: `n` is the number of
    examples in a batch, `gradient` that of their mean loss. For batches drawn at random its expectation is the mean
    square of one example's gradient, which is the empirical Fisher's diagonal, plus `n - 1` times the square of the
    task's mean gradient. The two are equal where the mean gradient vanishes, as at the end of training, and always
    with batches of one example.

    Args:
        model: Any module whose targets are `nn.Linear`, in the state to take the Fisher of.
        task: Gives the batches and the loss, a mean negative log-likelihood.
        targets: Module names of the target layers.
        track: Shows progress over the batches.

    Returns:
        For each target the diagonal `[d_out, d_in]` in float32; zero where no gradient reached the layer.

    Raises:
        LearningError: If a loss or a gradient is not finite.
        ValueError: If there is no batch.
    """
    return mean_over_examples(model, task, targets, _squared, track=track)


def _squared(gradient: Tensor, num_examples: int) -> Tensor:
    return gradient.float().square().mul_(num_examples)
