"""Statistics of a comparison: means with 95 % intervals over runs, and differences between methods run by run."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 30 degrees of freedom; beyond, the last one, which is a little wide."""

SCORES = ("transfer", "average", "last", "forgetting")
COSTS = ("trained_parameters", "added_parameters", "seconds_per_task", "peak_memory_mb")


Place = tuple[int, int]
"""The seed and the order of a run."""


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
    """The message of every run, or every search, that could not finish, by its folder."""
    inherits: dict[str, str] = field(default_factory=dict)
    """Whose settings a method was run with, for those without a search of their own."""

    @property
    def methods(self) -> list[str]:
        """The methods with at least one finished run, in their order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def score(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric of a method over its runs."""
        return estimate_runs({(row.seed, row.order): row.scores[key] for row in self.rows if row.method == method})

    def cost(self, method: str, key: str) -> Estimate | None:
        """Estimate a cost of a method over its runs."""
        return estimate_runs({(row.seed, row.order): row.costs[key] for row in self.rows if row.method == method})

    def num_runs(self, method: str) -> str:
        """Return how many of a method's runs finished, of how many."""
        finished = sum(row.method == method for row in self.rows)
        return f"{finished}/{self.config['seeds'] * self.config['orders']}"

    def num_trials(self, method: str) -> int:
        """Return how many settings were tried for a method, or for the one whose settings it takes."""
        return sum(trial.method == self.inherits.get(method, method) for trial in self.trials)

    def is_chosen(self, trial: Trial) -> bool:
        """Whether a method was run with the settings of a trial: the trial's own, or one that takes its settings."""
        takers = [name for name in self.chosen if self.inherits.get(name, name) == trial.method]
        return any(self.chosen[name] == trial.settings for name in takers)

    @property
    def notes(self) -> list[str]:
        """What to say below the tables: which intervals these are, how costs were taken, what was left out."""
        config, reference = self.config, self.config["reference"]
        interval = "Student's t over the seeds"
        if config["orders"] > 1:
            interval = "the wider of Student's t over the means of the orders and over the means of the seeds"
        notes = [f"Intervals: 95 %, {interval}; they say nothing of other test images."]
        for source in dict.fromkeys(self.inherits.values()):
            names = ", ".join(name for name in self.inherits if self.inherits[name] == source)
            notes.append(f"Run with the settings chosen for {source}, without a search of their own: {names}.")
        notes.append(
            f"Seconds: of runs that went {config['jobs']} at a time, with {config['threads']} threads each. MiB: of the"
            " GPU where there is one, otherwise of the whole process, its libraries included."
        )
        if reference not in self.methods:
            notes.append(f"No differences: {reference}, the reference, is not among the methods with a finished run.")
        return notes

    def difference(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric's difference to the reference method by equal seed and order; None without one."""
        mine, other = (
            {(row.seed, row.order): row.scores[key] for row in self.rows if row.method == name}
            for name in (method, self.config["reference"])
        )
        pairs = {place: (mine[place], other[place]) for place in mine if place in other}
        return estimate_runs({place: a - b for place, (a, b) in pairs.items() if a is not None and b is not None})

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: what was tried, what was chosen, each run, and the tables."""
        return {
            "format": 2,
            "config": self.config,
            "search": [asdict(trial) for trial in self.trials],
            "chosen": self.chosen,
            "inherits": self.inherits,
            "trials": {method: self.num_trials(method) for method in self.methods},
            "runs": [asdict(row) for row in self.rows],
            "failures": self.failures,
            "table": {
                method: {key: _plain(self.score(method, key)) for key in SCORES}
                | {key: _plain(self.cost(method, key)) for key in COSTS}
                for method in self.methods
            },
            "differences": {
                method: {key: _plain(self.difference(method, key)) for key in SCORES}
                for method in self.methods
                if method != self.config["reference"] in self.methods
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


def estimate_runs(values: Mapping[Place, float | None]) -> Estimate | None:
    """Return the mean of runs and its 95 % interval, which takes runs of one order, or of one seed, as alike.

    Seeds and orders are crossed, so runs are not independent. With one order: Student's t over the seeds. With several:
    of the interval over the means of the orders and the one over the means of the seeds, the wider.
    """
    known = {place: value for place, value in values.items() if value is not None}
    by_seed, by_order = (_means(known, side) for side in (0, 1))
    if not known:
        return None
    groups = [by_seed] if len(by_order) == 1 else [by_seed, by_order]
    widths = [found.half_width for group in groups if (found := estimate(group)) and found.half_width is not None]
    return Estimate(statistics.fmean(known.values()), max(widths, default=None), len(known))


def _means(values: Mapping[Place, float], side: int) -> list[float]:
    """Return the mean of the runs of each seed (side 0), or of each order (side 1)."""
    groups: dict[int, list[float]] = {}
    for place, value in values.items():
        groups.setdefault(place[side], []).append(value)
    return [statistics.fmean(group) for group in groups.values()]


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
