"""How long and how fast pre-training runs: all follows the clock, not the number of steps."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and optimiser of a run; the learning rate follows the clock, not the steps."""

    minutes: float
    rate: float = 1e-3
    decay: float = 0.08
    batch: int = 48
    negatives: int = 96
    warmup: float = 0.03
    average: float = 0.999
    save_every: float = 120.0
    text_steps: int = 120
    texts: int = 24
    joint: float = 0.8
    hardest: float = 0.5
    hardest_at: float = 0.45
    easiest: float = 0.1
    start: str = ""


def rate_at(progress: float, schedule: Schedule) -> float:
    """Return the learning rate at a share of the time: linear warm-up, then a half cosine to zero."""
    if progress < schedule.warmup:
        return schedule.rate * (progress / schedule.warmup + 0.01)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * (progress - schedule.warmup) / (1 - schedule.warmup)))
