"""The diagonal of the Fisher information of a model's weights on a task: how much each weight matters to it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from keeplora.layers.gradients import averages
from keeplora.layers.statistics import SquaredGradient
from keeplora.progress import Track, silent
from keeplora.task import Batch, DeferredGradient, Task, TaskLike, length_of, map_tensors


def fisher_diagonals(
    model: nn.Module, task: Task, targets: list[str], *, batch_size: int | None = None, track: Track = silent
) -> dict[str, Tensor]:
    """Estimate the diagonal of the empirical Fisher information of the target weights from one gradient pass.

    The estimate is the mean over batches, each by its weight, of `n * gradient ** 2`: `n` is the weight of a batch, the
    number of its examples, `gradient` that of their mean loss. For batches drawn at random its expectation is the mean
    square of one example's gradient, which is the empirical Fisher's diagonal, plus `n - 1` times the square of the
    task's mean gradient. The two are equal where the mean gradient vanishes, and always with batches of one example;
    with few batches the estimate is noisy besides, so that smaller ones are better and slower.
    The task's loss is a mean negative log-likelihood. Batches are cut into ones of at most `batch_size` examples, along
    the first dimension of every tensor in them that has an entry for each example. Returned is for each target the
    diagonal `[d_out, d_in]` in float32; zero where no gradient reached the layer.

    Raises:
        LearningError: If a loss or a gradient is not finite.
        ValueError: If there is no batch, or the loss depends on a weight otherwise than through its layer.
    """
    return averages(SquaredGradient, model, _Cut(Task.of(task), batch_size), targets, 1.0, track)


class _Cut(TaskLike):
    """A task whose batches are read by as many examples, or whole; nothing is kept from one to the next."""

    def __init__(self, task: Task, batch_size: int | None) -> None:
        super().__init__(task)
        self.batch_size = batch_size

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        count = length_of(batch, self)
        size = self.batch_size or count

        def part(start: int) -> Batch:
            return map_tensors(lambda one: one[start : start + size] if one.shape[:1] == (count,) else one, batch)

        return [part(start) for start in range(0, count, size)]

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        yield ()
