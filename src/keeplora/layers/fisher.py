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

    The estimate `[d_out, d_in]` in float32 is the mean over batches of at most `batch_size` examples, each by its
    weight, of `n * gradient ** 2`, with `n` the number of its examples and `gradient` that of their mean loss. Its
    expectation is the mean square of one example's gradient, which is the diagonal, plus `n - 1` times the square of
    the task's mean gradient: the two are equal where the mean gradient vanishes, and always for batches of one. The
    loss is a mean negative log-likelihood. Batches are cut along the first dimension of every tensor with an entry for
    each example. Raises what `mean_gradients` does.
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
