"""Named scores of predictions against references, in percent.

Predictions of classes are whole numbers, and so are their references. Answers are texts; their references are records,
which have `question`, `answer` and `place`.
"""

from collections.abc import Sequence
from typing import Any

from keeplora.evaluation.text_metrics import TEXT_METRICS, Metric
from keeplora.registry import Registry


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Return the share of right answers, in percent."""
    right = [bool(one == other) for one, other in zip(predictions, references, strict=True)]
    return 100.0 * sum(right) / len(right)


METRICS: Registry[Metric] = Registry("metric", {"accuracy": accuracy, **TEXT_METRICS})
