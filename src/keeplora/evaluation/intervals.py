"""Statistics of a comparison: means with 95 % intervals over runs, and differences between methods run by run."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, the last one, which is a little wide."""

Place = tuple[int, int]  # The seed and the order of a run.


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % interval (Student's t); None for the width of a single value."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, spec: str) -> str:
        mean = format(self.mean, spec or ".2f")
        return mean if self.half_width is None else f"{mean} ± {format(self.half_width, spec.lstrip('+') or '.2f')}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Return the mean and its 95 % interval by Student's t; None if there is no value."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return Estimate(known[0], None, 1) if known else None
    quantile = T_975[min(len(known) - 1, len(T_975)) - 1]
    half_width = quantile * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(statistics.fmean(known), half_width, len(known))


def estimate_runs(values: Mapping[Place, float]) -> Estimate | None:
    """Return the mean of runs and its 95 % interval, which takes runs of one order, or of one seed, as alike.

    Seeds and orders are crossed, so runs are not independent. With one order: Student's t over the seeds. With several:
    of the interval over the means of the orders and the one over the means of the seeds, the wider.
    """
    if not values:
        return None
    groups: tuple[dict[int, list[float]], ...] = ({}, {})
    for place, value in values.items():
        for side, group in zip(place, groups, strict=True):
            group.setdefault(side, []).append(value)
    by_seed, by_order = ([statistics.fmean(runs) for runs in group.values()] for group in groups)
    sides = [by_seed] if len(by_order) == 1 else [by_seed, by_order]
    widths = [found.half_width for side in sides if (found := estimate(side)) and found.half_width is not None]
    return Estimate(statistics.fmean(values.values()), max(widths, default=None), len(values))
