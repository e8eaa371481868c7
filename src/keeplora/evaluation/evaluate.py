"""A model's score on every task of a stream."""

from collections.abc import Callable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import LearningError
from keeplora.evaluation.metrics import METRICS
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.module_state import device_of, evaluation_mode
from keeplora.layers.statistics import require_finite
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.task import Batch, to_device

Keep = Callable[[StreamTask, list[Any], list[Any]], None]
"""Called with the predictions of a task and what they were compared with."""


def evaluate(
    model: nn.Module,
    tasks: list[StreamTask],
    *,
    track: Track = silent,
    keep: Keep = lambda task, predictions, references: None,
) -> list[float]:
    """Score a model on the held-out examples of every task, in percent; text features are computed once for each.

    A `LearningError` names the task and the batch on which the model gives anything that is not finite.
    """
    return [_score(model, task, track, keep) for task in tasks]


def _score(model: nn.Module, task: StreamTask, track: Track, keep: Keep) -> float:
    predictions: list[Any] = []
    references: list[Any] = []
    batches = task.test_batches()
    total = len(batches) if isinstance(batches, Sized) else None
    # Not inference mode: what a model or a task caches inside could not be trained with afterwards.
    with torch.no_grad(), evaluation_mode(model), fused_layers(model), task.frozen(model):
        for number, batch in enumerate(track(batches, f"{task.name}: evaluating", total), start=1):
            for part in task.micro_batches(to_device(batch, device_of(model))):
                predictions += plain(_predicted(model, task, part, number))
                references += plain(task.references(part))
    keep(task, predictions, references)
    return METRICS.find(task.metric)(predictions, references)


def plain(values: Tensor | list[Any]) -> list[Any]:
    """Return predictions or references as a list."""
    return values.tolist() if isinstance(values, Tensor) else values


def _predicted(model: nn.Module, task: StreamTask, batch: Batch, number: int) -> Tensor | list[Any]:
    """Return the answers to a batch, finite ones: the largest of several NaN would be an answer like any other."""
    try:
        answers = task.predict(model, batch)
        if isinstance(answers, Tensor):
            require_finite(answers, "the answers are not finite")
    except LearningError as error:
        raise LearningError(f"task {task.name!r}, test batch {number}: {error}") from None
    return answers
