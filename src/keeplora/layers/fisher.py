"""The diagonal of the Fisher information of a model's weights on a task: how much each weight matters to it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from keeplora.layers.gradients import averages
from keeplora.layers.statistics import SquaredGradient
from keeplora.progress import Track, silent
from keeplora.task import Batch, DeferredGradient, Task, TaskLike, length_of


def fisher_diagonals(
    model: nn.Module, task: Task, targets: list[str], *, batch_size: int | None = None, track: Track = silent
) -> dict[str, Tensor]:
    """Estimate the diagonal of the empirical Fisher information of the target weights from one gradient pass.

    The estimate is the mean over batches, each by its weight, of `n * gradient ** 2`: `n` is the weight of a batch, the
    number of its examples, `gradient` that of their mean loss. For batches drawn at random its expectation is the mean
    square of one example's gradient, which is the empirical Fisher's diagonal, plus `n - 1` times the square of the
    task's mean gradient. The two are equal where the mean gradient vanishes, and always with batches of one example;
    with few batches the estimate is noisy besides, so that smaller ones are better and slower.

    Args:
        model: Any module whose targets are `nn.Linear`, in the state to take the Fisher of.
        task: Gives the batches and the loss, a mean negative log-likelihood.
        targets: Module names of the target layers.
        batch_size: Cut the task's batches into ones of at most this many examples: along the first dimension of every
            tensor in them that has an entry for each example.
        track: Shows progress over the batches.

    Returns:
        For each target the diagonal `[d_out, d_in]` in float32; zero where no gradient reached the layer.

    Raises:
        LearningError: If a loss or a gradient is not finite.
        ValueError: If there is no batch, or the loss depends on a weight otherwise than through its layer.
    """
    return averages(SquaredGradient, model, _Cut(Task.of(task), batch_size), targets, share=1.0, track=track)


class _Cut(TaskLike):
    """A task whose batches are read by as many examples, or whole; nothing is kept from one to the next."""

    def __init__(self, task: Task, batch_size: int | None) -> None:
        super().__init__(task)
        self.batch_size = batch_size

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        count = length_of(batch, self)
        size = self.batch_size or count
        return [_part(batch, count, slice(start, start + size)) for start in range(0, count, size)]

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        yield ()


def _part(batch: Batch, count: int, part: slice) -> Batch:
    """Return some examples of a batch (nested in dicts, lists or tuples)."""
    if isinstance(batch, Tensor):
        return batch[part] if batch.dim() > 0 and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return {key: _part(value, count, part) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        cut = [_part(value, count, part) for value in batch]
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return batch
