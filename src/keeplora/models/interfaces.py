"""What a model family must know, and what a task of a stream offers besides its training batches."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from keeplora.data.benchmark import TaskSpec
from keeplora.models.pretrained import WHOLE, Precision
from keeplora.progress import Track
from keeplora.task import Batch, Task


class StreamTask(Task):
    """A task that can be evaluated: held-out batches, predictions and references for a metric."""

    metric: str = "accuracy"
    data: Mapping[str, Any] = MappingProxyType({})
    """What it is made of, as JSON values: `classes`, numbers of `images`, and a `digest`; empty if it does not tell."""
    epochs: int | None = None  # Number of training epochs, where it differs from the run's.

    def test_batches(self) -> Iterable[Batch]:
        """Return the held-out batches, in a fixed order."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: Batch) -> Tensor | list[Any]:
        """Return the model's `n` answers to a batch; a `LearningError` says that its outputs are not finite."""
        raise NotImplementedError

    def shown(self) -> list[str]:
        """Return a few of the texts that a model reads for this task, for people."""
        return []

    def examples(self, number: int) -> list[tuple[dict[str, str], Image.Image | None]]:
        """Return the first held-out questions for people to look at: `id`, `question` and `answer`, and the image."""
        return []

    def remarks(self) -> list[str]:
        """Return what is good to know of the data before they are learned."""
        return []

    def describe(self, prediction: Any, reference: Any) -> dict[str, Any] | None:
        """Return what is kept of one prediction, as JSON values; None to keep nothing."""
        return None

    def references(self, batch: Batch) -> Tensor | list[Any]:
        """Return what the metric compares the `n` answers to a batch with."""
        raise NotImplementedError


class Family(Protocol):
    """How to load one kind of model, make tasks for it, and save it again."""

    def load(self, name: str, precision: Precision = WHOLE) -> nn.Module:
        """Load a model by hub name or folder; raise a `ValueError` if weights are unreadable or missing."""

    def tasks(
        self, name: str, specs: tuple[TaskSpec, ...], *, batch_size: int, evaluation: str, seed: int, track: Track
    ) -> list[StreamTask]:
        """Read, check and prepare the data of every task for the model `name`; a `ValueError` says what is wrong."""

    def save(self, model: nn.Module, name: str, folder: Path) -> None:
        """Write the model, and what is needed to use it, so that `from_pretrained` loads the folder."""
