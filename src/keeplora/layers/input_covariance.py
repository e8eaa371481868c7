"""What the rows that reach layers add up to: their second moment, one way or the other."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.layers.distributed import batches_of, sum_over_processes
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.module_state import evaluation_mode
from keeplora.layers.statistics import require_finite
from keeplora.progress import Track, silent
from keeplora.task import Batch, DeferredGradient, Task


class SecondMoment:
    """Sum of outer products of all rows."""

    takes_micro_batches: ClassVar[bool] = True
    """Whether it is the same however the rows are cut into batches."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, inputs: Tensor, real: Tensor | None) -> None:
        """Add the rows of inputs `[..., d_in]`, or of those that are real."""
        rows = (inputs.reshape(-1, inputs.shape[-1]) if real is None else inputs[real]).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total = self.total.to(rows.device)  # It may come from a file.
        self.total.addmm_(rows.T, rows)

    def gram(self) -> Tensor:
        """Return the gram `[d_in, d_in]`, in float32."""
        assert self.total is not None
        return self.total


class BatchMean:
    """Inputs averaged over batches by their place in the batch, as the released code does; then outer products."""

    takes_micro_batches: ClassVar[bool] = False

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.num_batches = 0

    def add(self, inputs: Tensor, real: Tensor | None) -> None:
        """Add the inputs `[n, ..., d_in]` of a batch; what is not real counts as zero."""
        inputs = inputs.float() if real is None else inputs.float() * real.unsqueeze(-1)
        if self.total is None:
            self.total = torch.zeros_like(inputs)
        if inputs.shape == self.total.shape:
            self.total += inputs
            self.num_batches += 1

    def gram(self) -> Tensor:
        """Return the gram `[d_in, d_in]`, in float32."""
        assert self.total is not None
        rows = self.total.reshape(-1, self.total.shape[-1]) / self.num_batches
        return rows.T @ rows


Statistic = SecondMoment | BatchMean

STATISTICS: dict[str, type[Statistic]] = {
    "second_moment": SecondMoment,
    "batch_mean": BatchMean,
}


class InputMoments:
    """Collects a statistic of the inputs of layers while a model runs.

    `leaders` names for each layer the first one that gets the very same tensor; `statistics` has one for each leader.
    """

    def __init__(self, task: Task, kind: type[Statistic] = SecondMoment) -> None:
        self.task = task
        self.kind = kind
        self.leaders: dict[str, str] = {}
        self.statistics: dict[str, Statistic] = {}
        self._batch: Batch = None
        self._seen: list[tuple[weakref.ref[Tensor], int, str]] = []

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch layers by their names; stop when the block ends."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            self._seen.clear()
            for handle in handles:
                handle.remove()

    def next_batch(self, batch: Batch) -> None:
        """Say which batch the model is about to see: the task tells its padding."""
        self._batch = batch
        self._seen.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def add_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            # Tells a tensor from what was made of it in place.
            version = 0 if inputs.is_inference() else inputs._version
            leader = next((one for ref, v, one in reversed(self._seen) if ref() is inputs and v == version), name)
            if self.leaders.setdefault(name, leader) != leader:
                raise ValueError(
                    f"layer {name!r} shared its input with {self.leaders[name]!r} in one batch and with {leader!r} in"
                    " another; a model that routes its inputs by their content cannot have these layers as targets"
                )
            if leader == name:
                self._seen.append((weakref.ref(inputs), version, name))
                self.statistics.setdefault(name, self.kind()).add(inputs, self._padding_mask(name, inputs))

        return add_input

    def _padding_mask(self, name: str, inputs: Tensor) -> Tensor | None:
        real = self.task.padding_mask(name, self._batch)
        if real is not None and real.shape != inputs.shape[:-1]:
            raise ValueError(
                f"task {self.task.name!r}: padding_mask({name!r}) has shape {tuple(real.shape)}, the layer's input has"
                f" {tuple(inputs.shape)}; return one flag for each row, or None"
            )
        return None if real is None else real.to(inputs.device, torch.bool)


def input_grams(
    model: nn.Module, task: Task, targets: list[str], *, features: str = "second_moment", track: Track = silent
) -> dict[str, Tensor]:
    """Accumulate the second moment of every target layer's input over a task's examples (X X^T of Eq. 9).

    Padding rows, as `task.padding_mask` tells them, are left out. Layers that receive the very same tensor, such as the
    query, key and value projections of a block, share one gram: the values of the result are then one object.

    Args:
        model: Any module whose targets are `nn.Linear`.
        task: Gives the batches; its loss is the forward pass.
        targets: Module names of the target layers.
        features: `second_moment` for the exact statistic; `batch_mean` for the released code's, which averages inputs
            over batches by their place in the batch and leaves out batches of another size than the first.
        track: Shows progress over the batches.

    Returns:
        For each target the gram `[d_in, d_in]` in float32, a sum over rows; its scale carries no meaning.

    Raises:
        ValueError: If a layer was never reached, if its input is not finite, or if it shares its input with another
            layer in one batch and not in the next.
    """
    inputs = InputMoments(task, STATISTICS[features])
    watching = inputs.watching({name: model.get_submodule(name) for name in targets})
    with torch.no_grad(), evaluation_mode(model), fused_layers(model), task.frozen(model), watching:
        for batch in batches_of(model, task, 1.0, track, "features"):
            for part in task.micro_batches(batch) if inputs.kind.takes_micro_batches else [batch]:
                inputs.next_batch(part)
                task.loss(model, part)
    return summed_grams(inputs, targets)


def summed_grams(inputs: InputMoments, targets: list[str]) -> dict[str, Tensor]:
    """Add up over all processes what was seen of the targets' inputs; return what `input_grams` does, or raise it."""
    grams = {leader: statistic.gram() for leader, statistic in inputs.statistics.items()}
    sum_over_processes(grams, 0)
    for name in targets:
        if name not in inputs.leaders:
            raise ValueError(f"task {inputs.task.name!r} never ran layer {name!r}; leave it out of the targets")
    for leader, gram in grams.items():
        require_finite(gram, f"task {inputs.task.name!r}: the inputs of layer {leader!r} are not finite")
    return {name: grams[inputs.leaders[name]] for name in targets}


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


def pop_seen_inputs(model: nn.Module) -> SeenInputs | None:
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
