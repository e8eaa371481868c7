"""Second moments of the inputs of the target layers: from a pass of their own, or from the last epoch of training."""

import math
from collections.abc import Sized
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.layers.statistics import Accumulator, BatchMean, InputCovariance, Watcher, collect, require_finite
from keeplora.progress import Track, silent
from keeplora.task import Batch, Task, TaskLike

FEATURES: dict[str, type[Accumulator]] = {"second_moment": InputCovariance, "batch_mean": BatchMean}
"""What the inputs of a layer add up to: exactly, or as in the released code."""

SEEN = "task_inputs"  # Name under which what was seen in training joins the adapted model.


def input_grams(
    model: nn.Module, task: Task, targets: list[str], *, features: str = "second_moment", track: Track = silent
) -> dict[str, Tensor]:
    """Accumulate the second moment of every target layer's input over a task's examples (X X^T of Eq. 9).

    Returned is for each target the gram `[d_in, d_in]` in float32, a sum over rows without the padding; layers that get
    the very same tensor share one object. `features` is a key of `FEATURES`. Raises a LearningError if an input is not
    finite, and a ValueError if a layer was never reached, or shares its input in one batch and not in the next.
    """
    kind = FEATURES[features]
    watcher = collect(model, task, {name: [kind()] for name in targets}, track=track, what="features")
    return _grams(watcher, targets)


def _grams(watcher: Watcher, targets: list[str]) -> dict[str, Tensor]:
    task = watcher.task.name
    for name in targets:
        if name not in watcher.leaders:
            raise ValueError(f"task {task!r} never ran layer {name!r}; leave it out of the targets")
    grams = {leader: watcher.accumulators[leader][0].result() for leader in set(watcher.leaders.values())}
    for leader, gram in grams.items():
        require_finite(gram, f"task {task!r}: the inputs of layer {leader!r} are not finite")
    return {name: grams[watcher.leaders[name]] for name in targets}


class SeenInputs(nn.Module):
    """How many batches of training went by, and the second moments of what layers got in the last epoch's.

    They are of slightly earlier weights than a pass of their own would see. Every checkpoint of training has them.
    """

    def __init__(self, task: Task, widths: dict[str, int]) -> None:
        """Begin with nothing; `task` tells the padding, `widths` the dimensions `d_in` of each layer's inputs."""
        super().__init__()
        self.widths = widths
        self.num_batches = 0
        self.num_wanted = 0
        self.watcher = Watcher(task, {name: [InputCovariance()] for name in widths})

    def get_extra_state(self) -> Tensor:
        """Return everything as one vector: the count, each layer's leader, and the leaders' grams."""
        names, leaders = list(self.widths), self.watcher.leaders
        places = [names.index(leaders[name]) if name in leaders else -1 for name in names]
        grams = [self._moment(name).result().flatten().cpu() for name in names if leaders.get(name) == name]
        return torch.cat([torch.tensor([float(self.num_batches), *map(float, places)]), *grams])

    def set_extra_state(self, state: Tensor) -> None:
        names = list(self.widths)
        numbers, rest = state[: 1 + len(names)].int().tolist(), state[1 + len(names) :]
        self.num_batches = numbers[0]
        self.watcher.leaders = {
            name: names[place] for name, place in zip(names, numbers[1:], strict=True) if place >= 0
        }
        for name in [name for name in names if self.watcher.leaders.get(name) == name]:
            d_in = self.widths[name]
            self._moment(name).total, rest = rest[: d_in**2].view(d_in, d_in).clone(), rest[d_in**2 :]

    def grams(self, device: torch.device) -> dict[str, Tensor]:
        """Return the grams `[d_in, d_in]` of all layers by name, over all processes, on a device."""
        if self.num_batches < self.num_wanted:
            raise ValueError(_not_seen(self.watcher.task))
        for name in set(self.watcher.leaders.values()):
            self._moment(name).total = self._moment(name).result().to(device)
        self.watcher.reduce(device)
        return _grams(self.watcher, list(self.widths))

    def _moment(self, name: str) -> Accumulator:
        return self.watcher.accumulators[name][0]


class Part(NamedTuple):
    """A micro-batch of a watched task."""

    batch: Batch
    is_last: bool


class Watched(TaskLike):
    """A task whose last epoch is watched while a model is trained on it, batch by batch or by its `micro_batches`."""

    def __init__(self, task: Task, seen: SeenInputs, layers: dict[str, nn.Module], epochs: int) -> None:
        super().__init__(task)
        self.seen = seen
        self.layers = layers
        self.num_unwatched = (epochs - 1) * batches_in_epoch(task)
        seen.num_wanted = epochs * batches_in_epoch(task)

    def micro_batches(self, batch: Batch) -> list[Part]:
        parts = list(self.task.micro_batches(batch))
        return [Part(part, number == len(parts)) for number, part in enumerate(parts, start=1)]

    def weight(self, batch: Batch | Part) -> float:
        return float(self.task.weight(batch.batch if isinstance(batch, Part) else batch))

    def loss(self, model: nn.Module, batch: Batch | Part) -> Tensor:
        """Return the task's loss, and look at the inputs of the layers in the last epoch."""
        part = batch if isinstance(batch, Part) else Part(batch, is_last=True)
        is_watched = self.seen.num_batches >= self.num_unwatched
        self.seen.num_batches += part.is_last
        watcher = self.seen.watcher
        with watcher.watching(self.layers if is_watched else {}), watcher.reading(part.batch):
            return cast(Tensor, self.task.loss(model, part.batch))


def grams_of(seen: SeenInputs | None, task: Task, device: torch.device) -> dict[str, Tensor]:
    """Return the grams that were seen in training."""
    if seen is None:
        raise ValueError(_not_seen(task))
    return seen.grams(device)


def _not_seen(task: Task) -> str:
    return (
        f"task {task.name!r}: features = 'last_epoch' needs the model to be trained on what"
        " method.training_task(model, task, epochs) returns, for so many epochs; do so, or set features ="
        " 'second_moment'"
    )


def batches_in_epoch(task: Task) -> int:
    """Return how many batches of a task each process trains on in an epoch."""
    batches = task.batches()
    if not isinstance(batches, Sized):
        raise ValueError(
            f"task {task.name!r}: features = 'last_epoch' needs the number of batches; let batches() return a"
            " DataLoader, or take another value"
        )
    processes = dist.get_world_size() if dist.is_initialized() and isinstance(batches, DataLoader) else 1
    return math.ceil(len(batches) / processes)
