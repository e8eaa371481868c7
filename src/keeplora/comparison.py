"""Statistics of a comparison: means with 95 % intervals over runs, and differences between methods run by run."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, the last one, which is a little wide."""

SCORES = ("transfer", "average", "last", "forgetting")
COSTS = ("trained_parameters", "added_parameters", "seconds_per_task", "peak_memory_mb")


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % interval (Student's t); None for the width of a single value."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half_width is None else f"{self.mean:.2f} ± {self.half_width:.2f}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class RunRow:
    """One finished run of a comparison: whose it is, and its scores and costs."""

    method: str
    seed: int
    order: int
    scores: dict[str, float | None]
    """The metrics of `SCORES`, in percent; None where one means nothing for the method."""
    costs: dict[str, float]
    """The figures of `COSTS`; memory in MiB, the most of any phase."""


@dataclass(frozen=True)
class Trial:
    """One setting that was tried on the validation splits."""

    method: str
    settings: dict[str, Any]
    scores: dict[str, float | None]
    value: float | None
    """What the search maximises; None if the run failed."""
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare.json` holds, and what its tables and its chart show."""

    config: dict[str, Any]
    trials: list[Trial]
    chosen: dict[str, dict[str, Any]]
    rows: list[RunRow]
    failures: dict[str, str]
    """The message of every run that could not finish, by its folder."""

    @property
    def methods(self) -> list[str]:
        """The methods with at least one finished run, in their order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def score(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric of a method over its runs."""
        return estimate(row.scores[key] for row in self.rows if row.method == method)

    def cost(self, method: str, key: str) -> float:
        """Return the median of a cost over a method's runs."""
        return statistics.median(row.costs[key] for row in self.rows if row.method == method)

    def difference(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric's difference to the reference method over the runs of equal seed and order."""
        mine, other = (
            {(row.seed, row.order): row.scores[key] for row in self.rows if row.method == name}
            for name in (method, self.config["reference"])
        )
        pairs = [(mine[place], other[place]) for place in mine if place in other]
        return estimate(a - b for a, b in pairs if a is not None and b is not None)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: what was tried, what was chosen, each run, and the tables."""
        return {
            "format": 1,
            "config": self.config,
            "search": [asdict(trial) for trial in self.trials],
            "chosen": self.chosen,
            "runs": [asdict(row) for row in self.rows],
            "failures": self.failures,
            "table": {
                method: {key: _plain(self.score(method, key)) for key in SCORES}
                | {key: self.cost(method, key) for key in COSTS}
                for method in self.methods
            },
            "differences": {
                method: {key: _plain(self.difference(method, key)) for key in SCORES}
                for method in self.methods
                if method != self.config["reference"]
            },
        }


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Return the mean and its 95 % interval by Student's t; None if there is no value."""
    known: Sequence[float] = [value for value in values if value is not None]
    if not known:
        return None
    count = len(known)
    if count == 1:
        return Estimate(known[0], None, 1)
    quantile = T_975[min(count - 1, len(T_975)) - 1]
    return Estimate(statistics.fmean(known), quantile * statistics.stdev(known) / math.sqrt(count), count)


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
