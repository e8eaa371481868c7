"""What a run will take: seconds, from the pace of a few batches, and bytes on disk, from the shapes of the layers."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

FLOAT = 4  # Bytes of a float32 number.


class Pace(NamedTuple):
    """How many seconds a phase takes: some once, and some for every batch."""

    fixed: float = 0.0
    per_batch: float = 0.0

    def seconds(self, batches: float) -> float:
        """Return the seconds that a number of batches takes."""
        return self.fixed + self.per_batch * batches


class Paces(NamedTuple):
    """The pace of each phase of one task; `train` is that of one epoch."""

    gradient: Pace = Pace()
    train: Pace = Pace()
    merge: Pace = Pace()
    evaluate: Pace = Pace()


class Load(NamedTuple):
    """How much one task has to do: `batches` is of one epoch, `images` are those of both splits."""

    name: str
    classes: int
    images: int
    batches: int
    held_out_batches: int
    epochs: int


def pace_of(total: float, passes: Sequence[Sequence[float]]) -> Pace:
    """Split the total seconds of a phase into what it takes once and what every batch takes.

    `passes` has the seconds of each batch of every pass. A batch takes the median of all but the first of a pass; what
    that takes more is counted once.
    """
    passes = [one for one in passes if one]
    usual = [median(one[1:] or one) for one in passes]
    once = sum(max(0.0, one[0] - pace) for one, pace in zip(passes, usual, strict=True))
    between = max(0.0, total - sum(map(sum, passes)))
    return Pace(fixed=between + once, per_batch=sum(usual))


def estimate_seconds(
    loads: Sequence[Load],
    paces: Mapping[str, Paces],
    *,
    start: float = 0.0,
    per_image: float = 0.0,
    gradient_share: float = 1.0,
    evaluations: int | None = None,
) -> dict[str, float]:
    """Return the seconds of each phase of a run, over all tasks.

    The paces of a task that was not tried are interpolated in the number of classes, whose prompts every batch encodes.
    `start` is spent once, `per_image` to read an image, the gradient on a share of the batches. All tasks are evaluated
    before the first one and after each, unless a number of `evaluations` is given.
    """
    assert paces, "no task was tried"
    seconds = dict.fromkeys(("read", "start", "gradient", "train", "merge", "evaluate"), 0.0) | {"start": start}
    rounds = len(loads) + 1 if evaluations is None else evaluations
    tried = sorted((load for load in loads if load.name in paces), key=lambda load: load.classes)
    numbers = [load.classes for load in tried]
    values = np.array([paces[load.name] for load in tried]).transpose(1, 2, 0)  # [phases, fixed or per batch, tasks]
    for load in loads:
        between = (Pace(*(float(np.interp(load.classes, numbers, part)) for part in phase)) for phase in values)
        pace = paces[load.name] if load.name in paces else Paces(*between)
        seconds["read"] += per_image * load.images
        seconds["gradient"] += pace.gradient.seconds(math.ceil(round(gradient_share * load.batches, 6)))
        seconds["train"] += load.epochs * pace.train.seconds(load.batches)
        seconds["merge"] += pace.merge.seconds(load.batches)
        seconds["evaluate"] += rounds * pace.evaluate.seconds(load.held_out_batches)
    return seconds


def estimate_disk(
    shapes: dict[str, tuple[int, int]], free: dict[str, int], *, rank: int, num_tasks: int, model_bytes: int, other: int
) -> dict[str, int]:
    """Return the bytes that a run needs at most, by what they are for, without what needs none.

    A saved model of `model_bytes` counts twice: the new one is written before the old one goes. Directions are bounded
    by those `free` at the start. Each task leaves `other` bytes more, a classifier for one.
    """
    needs = {
        "merged model, twice": 2 * model_bytes,
        "adapters": FLOAT * rank * num_tasks * sum(d_out + d_in for d_out, d_in in shapes.values()),
        "directions, at most": FLOAT * sum(dims * shapes[name][1] for name, dims in free.items()),
        "gradients between phases": FLOAT * sum(d_out * d_in for d_out, d_in in shapes.values()),
        "other": other * num_tasks,
    }
    return {purpose: size for purpose, size in needs.items() if size}
