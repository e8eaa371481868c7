"""Named scores of predictions against references, in percent."""

from collections.abc import Callable

from torch import Tensor

from keeplora.registry import Registry


def accuracy(predictions: Tensor, references: Tensor) -> float:
    """Return the share of right answers, in percent."""
    return 100.0 * float((predictions == references).double().mean())


METRICS: Registry[Callable[[Tensor, Tensor], float]] = Registry("metric", {"accuracy": accuracy})
