"""What a comparison found: every run and trial, and the tables that are made of them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from keeplora.evaluation.intervals import Estimate, estimate_runs

SCORES = ("transfer", "average", "last", "forgetting")
COSTS = ("trained_parameters", "added_parameters", "seconds_per_task", "peak_memory_mb")


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


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
