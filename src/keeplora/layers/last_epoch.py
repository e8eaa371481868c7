"""The inputs' second moments from the last epoch of training, in place of a pass of their own.

The model still changes during that epoch, so that the statistic is one of slightly earlier weights. What was seen is
part of the adapted model's state, so that a training that is cut off in the epoch goes on with it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.layers.gradients import summed_grams
from keeplora.layers.input_covariance import InputMoments, SecondMoment
from keeplora.task import Batch, DeferredGradient, Task

SEEN = "task_inputs"
"""Name under which what was seen joins the adapted model."""


class SeenInputs(nn.Module):
    """How many batches went by, and the second moments of what layers got in the last epoch's."""

    def __init__(self, task: Task, widths: dict[str, int]) -> None:
        """Begin with nothing.

        Args:
            task: Tells the padding.
            widths: By the layers' names, the dimensions `d_in` of their inputs.
        """
        super().__init__()
        self.widths = widths
        self.num_batches = 0
        self.num_wanted = 0
        self.inputs = InputMoments(task)

    def get_extra_state(self) -> Tensor:
        """Return everything as one vector: the count, each layer's leader, and the leaders' grams."""
        names = list(self.widths)
        leaders = [names.index(self.inputs.leaders[name]) if name in self.inputs.leaders else -1 for name in names]
        grams = [
            self.inputs.statistics[name].gram().flatten().cpu() for name in names if name in self.inputs.statistics
        ]
        return torch.cat([torch.tensor([float(self.num_batches), *map(float, leaders)]), *grams])

    def set_extra_state(self, state: Tensor) -> None:
        """Take up what `get_extra_state` returned."""
        names = list(self.widths)
        numbers, rest = state[: 1 + len(names)].int().tolist(), state[1 + len(names) :]
        self.num_batches = numbers[0]
        found = {name: names[index] for name, index in zip(names, numbers[1:], strict=True) if index >= 0}
        self.inputs.leaders = found
        for name in [name for name in names if name in found.values()]:
            d_in = self.widths[name]
            moment = SecondMoment()
            moment.total, rest = rest[: d_in**2].view(d_in, d_in).clone(), rest[d_in**2 :]
            self.inputs.statistics[name] = moment


class Part(NamedTuple):
    """A part of a batch of a watched task."""

    batch: Batch
    is_last: bool


class Watched(Task):
    """A task whose last epoch is watched while a model is trained on it.

    `loss` is called once for each batch, or for all of its `parts`.
    """

    def __init__(self, task: Task, seen: SeenInputs, layers: dict[str, nn.Module], epochs: int) -> None:
        self.name = task.name
        self.task = task
        self.seen = seen
        self.layers = layers
        self.num_unwatched = (epochs - 1) * batches_in_epoch(task)
        seen.num_wanted = epochs * batches_in_epoch(task)

    def batches(self) -> Iterable[Batch]:
        """Return the task's batches."""
        return self.task.batches()

    def micro_batches(self, batch: Batch) -> list[Part]:
        """Cut a batch as the task does."""
        parts = list(self.task.micro_batches(batch))
        return [Part(part, number == len(parts)) for number, part in enumerate(parts, start=1)]

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        """Let the task keep what depends on the weights alone."""
        with self.task.frozen(model) as deferred:
            yield deferred

    def weight(self, batch: Batch | Part) -> int:
        """Return the number of examples in a batch or a part."""
        return self.task.weight(batch.batch if isinstance(batch, Part) else batch)

    def loss(self, model: nn.Module, batch: Batch | Part) -> Tensor:
        """Return the task's loss, and look at the inputs of the layers in the last epoch."""
        part = batch if isinstance(batch, Part) else Part(batch, is_last=True)
        is_watched = self.seen.num_batches >= self.num_unwatched
        self.seen.num_batches += part.is_last
        if not is_watched:
            return self.task.loss(model, part.batch)
        self.seen.inputs.next_batch(part.batch)
        with self.seen.inputs.watching(self.layers):
            return self.task.loss(model, part.batch)


def take_out(model: nn.Module) -> SeenInputs | None:
    """Take what was seen out of an adapted model, if it is there."""
    seen = getattr(model, SEEN, None)
    if seen is not None:
        delattr(model, SEEN)
    return seen


def grams_of(seen: SeenInputs | None, task: Task, device: torch.device) -> dict[str, Tensor]:
    """Return the grams `[d_in, d_in]` of all layers by name, over all processes, on a device.

    Raises:
        ValueError: If the model was not trained on a training_task, or not until the end of its last epoch.
    """
    if seen is None or seen.num_batches < seen.num_wanted:
        raise ValueError(
            f"task {task.name!r}: features = 'last_epoch' needs the model to be trained on what"
            " method.training_task(model, task, epochs) returns, for so many epochs; do so, or set features ="
            " 'second_moment'"
        )
    for moment in seen.inputs.statistics.values():
        assert isinstance(moment, SecondMoment)
        moment.total = moment.gram().to(device)
    return summed_grams(seen.inputs, list(seen.widths))


def batches_in_epoch(task: Task) -> int:
    """Return how many batches of a task each process trains on in an epoch.

    Raises:
        ValueError: If `batches()` has no length.
    """
    batches = task.batches()
    if not isinstance(batches, Sized):
        raise ValueError(
            f"task {task.name!r}: features = 'last_epoch' needs the number of batches; let batches() return a"
            " DataLoader, or take another value"
        )
    processes = dist.get_world_size() if dist.is_initialized() and isinstance(batches, DataLoader) else 1
    return math.ceil(len(batches) / processes)
