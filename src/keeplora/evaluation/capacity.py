"""How much room a stream has left: the free input dimensions of every layer, and how many more tasks they are for.

Read from the certificates of the finished tasks alone (`task.json`). Methods that protect nothing have none.

The forecast takes each layer's mean over its last three tasks as what a further task of the same kind will protect. It
is meant to be simple and to err on the safe side: what is protected already counts towards the share that a task wants
covered, so that tasks tend to add less the more of them there were. The first task is left out; before it, only the
principal subspace was protected, and it adds more than any later one. Tasks of another kind can add more as well, and
a method whose share rises from task to task does: no number made from the past knows them.
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

RECENT = 3
"""How many of the last tasks the forecast is made from."""

MOST = 99
"""A forecast of more tasks than this says just that."""

logger = logging.getLogger(__name__)


class Layer(BaseModel, extra="allow", strict=True):
    """What a certificate says of the room in one layer."""

    residual_dims: Count
    protected_dims: Count
    rank: Count


@dataclass(frozen=True)
class LayerCapacity:
    """The free input dimensions of one layer after each task, and what they are enough for."""

    d_in: int
    """Input dimensions of the layer."""
    left: tuple[int, ...]
    """How many of them no basis covered yet, after each task."""
    rank: int
    """Rank of an update that finds room enough."""

    @property
    def share(self) -> float:
        """The share of the dimensions that is left after the last task."""
        return self.left[-1] / self.d_in

    @property
    def added(self) -> float | None:
        """How many dimensions a task takes, by the last tasks; None after one task, which tells nothing of others."""
        return fmean(self._steps) if self._steps else None

    @property
    def _steps(self) -> list[int]:
        """How many dimensions each of the last tasks took."""
        return [before - after for before, after in pairwise(self.left)][-RECENT:]

    @property
    def full_rank_tasks(self) -> float | None:
        """How many more tasks will find `rank` free dimensions; infinity if none are taken, None if unknown."""
        return self._tasks_that_find(self.rank)

    @property
    def tasks_at_all(self) -> float | None:
        """How many more tasks will find a free dimension; infinity if none are taken, None if unknown."""
        return self._tasks_that_find(1)

    def _tasks_that_find(self, dims: int) -> float | None:
        if self.left[-1] < dims:
            return 0
        if not self._steps:
            return None
        taken = sum(self._steps)  # In whole numbers: rounding could cost a task.
        return math.inf if taken <= 0 else 1 + (self.left[-1] - dims) * len(self._steps) // taken


@dataclass(frozen=True)
class Capacity:
    """The room of every layer that a method protects."""

    tasks: tuple[str, ...]
    """The finished tasks."""
    layers: dict[str, LayerCapacity] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank that an update has where there is room for it."""
        return max(room.rank for room in self.layers.values())

    def by_kind(self) -> dict[str, list[LayerCapacity]]:
        """Group the layers of equal name but for the numbers in it, so that all blocks of a tower are together."""
        groups: dict[str, list[LayerCapacity]] = {}
        for name, room in self.layers.items():
            groups.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), []).append(room)
        return groups

    def first_to_fill(self) -> str:
        """Return the name of the layer with the fewest tasks to go; of equal ones, that with the smallest share."""

        def order(name: str) -> tuple[float, float]:
            tasks = self.layers[name].full_rank_tasks
            return math.inf if tasks is None else tasks, self.layers[name].share

        return min(self.layers, key=order)


def capacity_of(tasks: Sequence[Mapping[str, Any]]) -> Capacity | None:
    """Return the room that the finished tasks have left, or None if nothing is protected.

    Args:
        tasks: What `task.json` holds of each, such as `RunDirectory.tasks`.

    Raises:
        ValueError: If a certificate is damaged; the message names the task.
    """
    named = [(task.get("name", ""), _layers_of(task)) for task in tasks]
    certified = [(name, layers) for name, layers in named if layers]
    if not certified:
        return None
    layers = [layers for _, layers in certified]
    widths = {key: _width(layer) for key, layer in layers[-1].items()}
    for name, found in certified:
        if {key: _width(layer) for key, layer in found.items()} != widths or 0 in widths.values():
            raise ValueError(f"the certificate in task.json of task {name!r} is of other layers than the last one")
    # A rank is small where a task needs no more, or finds no room: the largest one is what updates ask for.
    rank = max(layer.rank for found in layers for layer in found.values())
    rooms = {}
    for name, last in layers[-1].items():
        d_in = _width(last)
        left = tuple(found[name].residual_dims for found in layers)
        rooms[name] = LayerCapacity(d_in=d_in, left=left, rank=min(max(rank, 1), d_in))
    return Capacity(tasks=tuple(name for name, _ in certified), layers=rooms)


def _layers_of(task: Mapping[str, Any]) -> dict[str, Layer]:
    place = f"the certificate in task.json of task {task.get('name')!r}"
    return require(dict[str, Layer], require(dict[str, Any], task["certificate"], place).get("layers", {}), place)


def _width(layer: Layer) -> int:
    return layer.residual_dims + layer.protected_dims


def forecast(capacity: Capacity) -> str:
    """Say in a sentence or two which layer runs out first, when, and when half of the layers do."""
    rooms = list(capacity.layers.values())
    name = capacity.first_to_fill()
    first = capacity.layers[name]
    place = f"{name} ({first.left[-1]} of {first.d_in} input dimensions free)"
    if not all(room.left[-1] for room in rooms):
        full = sum(room.left[-1] == 0 for room in rooms)
        return f"{full} of {len(rooms)} layers are full and learn no more; the first is {place}."
    if first.full_rank_tasks == 0:
        short = sum(room.full_rank_tasks == 0 for room in rooms)
        return f"{short} of {len(rooms)} layers have no room for rank {capacity.rank} any more; the first is {place}."
    if first.full_rank_tasks is None:
        return f"A forecast needs two tasks. The fullest layer is {place}."
    if math.isinf(first.full_rank_tasks):
        return f"The last tasks took no dimension of any layer; the fullest is {place}."
    half = median(math.inf if room.full_rank_tasks is None else room.full_rank_tasks for room in rooms)
    recent = min(RECENT, len(first.left) - 1)
    return (
        f"If tasks go on like the last{f' {recent}' if recent > 1 else ''}, {_tasks(first.full_rank_tasks)} more find"
        f" room for rank {capacity.rank} in every layer. The first to run out is {place}, full after"
        f" {_tasks(first.tasks_at_all)}; half of the layers last for"
        f" {_tasks(half) if math.isfinite(half) else 'as long as one can see'}."
    )


def _tasks(count: float | None) -> str:
    assert count is not None, "asked for before there was a forecast"
    if count > MOST:
        return f"more than {MOST} tasks"
    return f"about {count:.0f} task{'' if count == 1 else 's'}"


def warn_of_full_layers(tasks: Sequence[Mapping[str, Any]], num_to_come: int) -> None:
    """Log a warning when layers are about to run out: they have room for the rank in one more task at most.

    Each layer is named once, after the task that brought it there, and only if a task that it concerns is to come.

    Args:
        tasks: What `task.json` holds of each finished task.
        num_to_come: How many tasks the stream still has.
    """
    capacity, before = capacity_of(tasks), capacity_of(tasks[:-1])
    if capacity is None:
        return
    enough = min(num_to_come, 2)
    known = _short(before, 2) if before else set()
    if new := [name for name in capacity.layers if name in _short(capacity, enough) - known]:
        listed = ", ".join(f"{name} ({capacity.layers[name].left[-1]} left)" for name in new)
        logger.warning(
            "after task %r: %d of %d layers have room for rank %d in one more task at most, by the forecast: %s",
            capacity.tasks[-1], len(new), len(capacity.layers), capacity.rank, listed,
        )  # fmt: skip


def _short(capacity: Capacity, enough: int) -> set[str]:
    """Return the layers that have room for the rank in fewer tasks than enough."""
    rooms = capacity.layers.items()
    return {name for name, room in rooms if (tasks := room.full_rank_tasks) is not None and tasks < enough}
