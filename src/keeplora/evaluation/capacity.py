"""Remaining capacity: the free input dimensions of every layer, and how many more tasks they are enough for.

A further task is expected to take what a layer's last three took on average, without the first, which takes more.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from pydantic import BaseModel

from keeplora.config import Count, require

RECENT = 3  # How many of the last tasks the estimate is made from.
MOST = 99  # An estimate of more tasks than this says just that.

logger = logging.getLogger(__name__)


class Layer(BaseModel, extra="allow", strict=True):
    """What a certificate says of the capacity of one layer."""

    residual_dims: Count
    protected_dims: Count
    rank: Count


@dataclass(frozen=True)
class LayerCapacity:
    """The free input dimensions of one layer after each task, and how many tasks they are enough for."""

    d_in: int
    left: tuple[int, ...]  # How many of the input dimensions no basis covered yet, after each task.
    rank: int  # Rank of an update where enough dimensions are free.

    @property
    def share(self) -> float:
        """The share of the dimensions that is free after the last task."""
        return self.left[-1] / self.d_in

    @property
    def added(self) -> float | None:
        """How many dimensions a task takes, by the last tasks; None after one task, which tells nothing of others."""
        return fmean(self._steps) if self._steps else None

    @property
    def full_rank_tasks(self) -> float | None:
        """How many more tasks will find `rank` free dimensions."""
        return self.tasks_that_find(self.rank)

    def tasks_that_find(self, dims: int) -> float | None:
        """Return how many more tasks will find so many free dimensions: infinity if none are taken, None if unknown."""
        if self.left[-1] < dims:
            return 0
        if not self._steps:
            return None
        taken = sum(self._steps)  # In whole numbers: rounding could cost a task.
        return math.inf if taken <= 0 else 1 + (self.left[-1] - dims) * len(self._steps) // taken

    @property
    def _steps(self) -> list[int]:
        return [before - after for before, after in pairwise(self.left)][-RECENT:]


@dataclass(frozen=True)
class Capacity:
    """The remaining capacity of every layer that a method protects, after the finished tasks."""

    tasks: tuple[str, ...]
    layers: dict[str, LayerCapacity] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of an update in the layers with enough capacity."""
        return max(layer.rank for layer in self.layers.values())

    def by_kind(self) -> dict[str, list[LayerCapacity]]:
        """Group the layers whose names differ only in their numbers, so that all blocks of a tower are together."""
        groups: dict[str, list[LayerCapacity]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), []).append(layer)
        return groups

    def first_to_fill(self) -> str:
        """Return the name of the layer with the fewest tasks to go; of equal ones, that with the smallest share."""
        return min(self.layers, key=lambda name: (_known(self.layers[name]), self.layers[name].share))

    def short(self, num_tasks: int) -> list[str]:
        """Name the layers that have capacity for the rank in fewer tasks than these."""
        return [name for name, layer in self.layers.items() if _known(layer) < num_tasks]


def _known(layer: LayerCapacity) -> float:
    """Return how many more tasks will find the rank, infinity if unknown."""
    return math.inf if layer.full_rank_tasks is None else layer.full_rank_tasks


def capacity_of(tasks: Sequence[Mapping[str, Any]]) -> Capacity | None:
    """Return the capacity that finished tasks leave, None if none protects; ValueError: a damaged certificate."""
    certified: list[tuple[str, dict[str, Layer]]] = []
    for task in tasks:
        place = f"the certificate in task.json of task {task.get('name')!r}"
        layers = require(dict[str, Any], task["certificate"], place).get("layers", {})
        certified += [(task.get("name", ""), require(dict[str, Layer], layers, place))] if layers != {} else []
    if not certified:
        return None
    widths_of = [{key: it.residual_dims + it.protected_dims for key, it in layers.items()} for _, layers in certified]
    for (name, _), widths in zip(certified, widths_of, strict=True):
        if widths != widths_of[-1] or 0 in widths.values():
            raise ValueError(f"the certificate in task.json of task {name!r} is of other layers than the last one")
    # A rank is small where a task needs no more, or finds no more: the largest one is what updates ask for.
    rank = max(layer.rank for _, layers in certified for layer in layers.values())
    left = {key: tuple(layers[key].residual_dims for _, layers in certified) for key in widths}
    capacities = {key: LayerCapacity(d_in, left[key], min(max(rank, 1), d_in)) for key, d_in in widths.items()}
    return Capacity(tuple(name for name, _ in certified), capacities)


def forecast(capacity: Capacity) -> str:
    """Say in a sentence or two which layer runs out first, when, and when half of the layers do."""
    layers = list(capacity.layers.values())
    name = capacity.first_to_fill()
    first = capacity.layers[name]
    place = f"{name} ({first.left[-1]} of {first.d_in} input dimensions free)"
    if full := sum(layer.left[-1] == 0 for layer in layers):
        return f"{full} of {len(layers)} layers are full and learn no more; the first is {place}."
    if short := len(capacity.short(1)):
        return f"{short} of {len(layers)} layers have no capacity left for rank {capacity.rank}; the first is {place}."
    if first.full_rank_tasks is None:
        return f"An estimate needs two tasks. The fullest layer is {place}."
    if math.isinf(first.full_rank_tasks):
        return f"The last tasks took no dimension of any layer; the fullest is {place}."
    half = median(map(_known, layers))
    recent = min(RECENT, len(first.left) - 1)
    return (
        f"If tasks continue like the last{f' {recent}' if recent > 1 else ''}, {_tasks(first.full_rank_tasks)} more"
        f" find capacity for rank {capacity.rank} in every layer. The first to run out is {place}, full after"
        f" {_tasks(first.tasks_that_find(1))}; half of the layers last for"
        f" {_tasks(half) if math.isfinite(half) else 'as long as one can see'}."
    )


def _tasks(count: float | None) -> str:
    assert count is not None, "asked for before there was an estimate"
    return f"more than {MOST} tasks" if count > MOST else f"about {count:.0f} task{'' if count == 1 else 's'}"


def warn_of_full_layers(tasks: Sequence[Mapping[str, Any]], num_to_come: int) -> None:
    """Warn, once for each, of layers with capacity for the rank in one more task at most, if such a task is to come."""
    capacity, before = capacity_of(tasks), capacity_of(tasks[:-1])
    if capacity is None:
        return
    known = before.short(2) if before else []
    if new := [name for name in capacity.short(min(num_to_come, 2)) if name not in known]:
        listed = ", ".join(f"{name} ({capacity.layers[name].left[-1]} left)" for name in new)
        logger.warning(
            "after task %r: %d of %d layers have capacity for rank %d in one more task at most, by the estimate: %s",
            capacity.tasks[-1], len(new), len(capacity.layers), capacity.rank, listed,
        )  # fmt: skip
