"""What a comparison found: every run and trial, and the tables that are made of them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from keeplora.evaluation.accuracy_matrix import METRIC_NAMES
from keeplora.evaluation.intervals import Estimate, Place, estimate_runs

SCORES = {key: METRIC_NAMES[key] for key in ("transfer", "average", "last", "forgetting")}
"""The metrics that are compared, as the tables head them."""

COSTS = {"trained_parameters": ",.0f", "added_parameters": ",.0f", "seconds_per_task": ".1f", "peak_memory_mb": ",.0f"}
"""The costs, and how tables write each."""


@dataclass(frozen=True)
class RunRow:
    """One finished run of a comparison: whose it is, and its scores and costs."""

    method: str
    seed: int
    order: int
    scores: dict[str, float | None]  # The metrics of `SCORES`, in percent; None where one means nothing for the method.
    costs: dict[str, float]  # The figures of `COSTS`; memory in MiB, the most of any phase.
    tasks: list[str] = field(default_factory=list)  # In the order they were learned.
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One setting that was tried on the validation splits."""

    method: str
    settings: dict[str, Any]
    scores: dict[str, float | None]
    value: float | None  # What the search maximises; None if the run failed.
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare.json` holds, and what its tables and its chart show."""

    config: dict[str, Any]
    trials: list[Trial]
    chosen: dict[str, dict[str, Any]]
    rows: list[RunRow]
    failures: dict[str, str]  # The message of every run, or every search, that could not finish, by its folder.
    inherits: dict[str, str] = field(default_factory=dict)
    """Whose settings a method was run with, for those without a search of their own."""

    @property
    def methods(self) -> list[str]:
        """The methods with at least one finished run, in their order."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the first order of them."""
        return self.rows[0].tasks if self.rows else []

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings that every method was run with."""
        return {method: next(row.settings for row in self.rows if row.method == method) for method in self.methods}

    def score(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric, or a cost, of a method over its runs."""
        return estimate_runs(self._values(method, key))

    def difference(self, method: str, key: str) -> Estimate | None:
        """Estimate a metric's difference to the reference method by equal seed and order; None without one."""
        mine, other = self._values(method, key), self._values(self.config["reference"], key)
        return estimate_runs({place: mine[place] - other[place] for place in mine if place in other})

    def _values(self, method: str, key: str) -> dict[Place, float]:
        """Return what is known of a method's runs, by seed and order."""
        found = {(row.seed, row.order): (row.scores | row.costs)[key] for row in self.rows if row.method == method}
        return {place: value for place, value in found.items() if value is not None}

    def num_runs(self, method: str) -> str:
        """Return how many of a method's runs finished, of how many."""
        finished = sum(row.method == method for row in self.rows)
        return f"{finished}/{self.config['seeds'] * self.config['orders']}"

    def num_trials(self, method: str) -> int:
        """Return how many settings were tried for a method, or for the one whose settings it takes."""
        return sum(trial.method == self.inherits.get(method, method) for trial in self.trials)

    def is_chosen(self, trial: Trial) -> bool:
        """Whether a method was run with the settings of a trial: the trial's own, or one that takes its settings."""
        users = (settings for name, settings in self.chosen.items() if self.inherits.get(name, name) == trial.method)
        return trial.settings in users

    @property
    def notes(self) -> list[str]:
        """What to say below the tables: which intervals these are, how costs were taken, what was left out."""
        config, reference = self.config, self.config["reference"]
        interval = "Student's t over the seeds"
        if config["orders"] > 1:
            interval = "the wider of Student's t over the means of the orders and over the means of the seeds"
        notes = ["QUICK: few tasks, one epoch, one learning rate. It shows that all runs, not which method is better."]
        notes = notes if config.get("quick") else []
        notes.append(f"Intervals: 95 %, {interval}; they say nothing of other test images.")
        rates = sorted(config.get("budget", {}).get("learning_rate", ()))
        edges = [name for name, own in self.chosen.items() if own.get("learning_rate") in (*rates[:1], *rates[-1:])]
        if len(rates) > 1 and edges:
            names = ", ".join(f"{name} ({self.chosen[name]['learning_rate']:g})" for name in edges)
            notes.append(f"The best learning rate is at the edge of those tried: {names}; list more in [compare].")
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

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: what was tried, what was chosen, each run, and the tables."""
        others = [name for name in self.methods if name != self.config["reference"] in self.methods]

        def plain(value: Estimate | None) -> dict[str, Any] | None:
            return None if value is None else asdict(value)

        return {
            "format": 2,
            "config": self.config,
            "search": [asdict(trial) for trial in self.trials],
            "chosen": self.chosen,
            "inherits": self.inherits,
            "trials": {name: self.num_trials(name) for name in self.methods},
            "runs": [asdict(row) for row in self.rows],
            "failures": self.failures,
            "table": {name: {key: plain(self.score(name, key)) for key in (*SCORES, *COSTS)} for name in self.methods},
            "differences": {name: {key: plain(self.difference(name, key)) for key in SCORES} for name in others},
        }
