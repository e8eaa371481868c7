"""From the accuracy matrix to the field's metrics: Transfer, Average, Last, forgetting, backward transfer.

`accuracy[t][i]` is the score in percent after learning task t, on task i, for all tasks in every row. A run that is
not finished has fewer rows; its metrics are those of the rows there are, and None where no entry defines one.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

METRIC_NAMES = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
}
"""The metrics of `Results.summary`, as the tables head them."""

Matrix = list[list[float]]


def transfer(accuracy: Matrix) -> float | None:
    """Mean over tasks, from the second on, of the mean score before the task was learned."""
    num_tasks = len(accuracy[0]) if accuracy else 0
    return _mean(_mean(row[i] for row in accuracy[:i]) for i in range(1, num_tasks))


def average(accuracy: Matrix) -> float | None:
    """Mean over all entries."""
    return _mean(score for row in accuracy for score in row)


def last(accuracy: Matrix) -> float | None:
    """Mean over tasks after the last learned one."""
    return _mean(accuracy[-1]) if accuracy else None


def forgetting(accuracy: Matrix) -> float | None:
    """Mean over learned tasks but the last of the best earlier score, from its own learning on, less the final one."""
    learned = range(len(accuracy) - 1)
    return _mean(max(row[i] for row in accuracy[i:-1]) - accuracy[-1][i] for i in learned)


def backward_transfer(accuracy: Matrix) -> float | None:
    """Mean over learned tasks but the last of the final score less the score right after the task was learned."""
    return _mean(accuracy[-1][i] - accuracy[i][i] for i in range(len(accuracy) - 1))


def mean_of_own(accuracy: Matrix) -> float | None:
    """Mean over learned tasks of the score right after each was learned (MFT of MLLM-CL)."""
    return _mean(row[i] for i, row in enumerate(accuracy))


def mean_of_learned(accuracy: Matrix) -> float | None:
    """Mean over stages of the mean score on the tasks learned so far (MAA of MLLM-CL)."""
    return _mean(_mean(row[: i + 1]) for i, row in enumerate(accuracy))


@dataclass
class Results:
    """What `metrics.json` holds."""

    method: str
    benchmark: str
    model: str
    seed: int
    tasks: list[str]
    zero_shot: list[float]
    accuracy: Matrix = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    probes: dict[str, list[float]] = field(default_factory=dict)
    """Scores of tasks that are never learned: of the untouched model, and after every task."""
    settings: dict[str, Any] = field(default_factory=dict)  # By name, for who reads a report; `run.json` has them all.

    def to_json(self) -> dict[str, object]:
        """Return the keys of `metrics.json` in their order."""
        values = asdict(self)
        del values["settings"]
        if not self.probes:
            del values["probes"]
        costs = {key: values.pop(key) for key in ("seconds", "peak_memory_mb")}
        return values | self.summary() | self.summary_of_mllm_cl() | costs

    def summary(self) -> dict[str, float | None]:
        """Return the metrics of the accuracy matrix."""
        metrics = (transfer, average, last, forgetting, backward_transfer)
        return {metric.__name__: metric(self.accuracy) for metric in metrics}

    def summary_of_mllm_cl(self) -> dict[str, float | None]:
        """Return what MLLM-CL and UCIT report, by their names; MFN is Last, BWT backward transfer."""
        values = {"MFT": mean_of_own, "MFN": last, "MAA": mean_of_learned, "BWT": backward_transfer}
        return {name: metric(self.accuracy) for name, metric in values.items()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
