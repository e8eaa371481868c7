"""What the rows that reach layers add up to: their second moment, one way or the other."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from keeplora.task import Batch, Task


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
