"""What a run's model answered to a few of the test questions, before and after it learned: for people to look at."""

import base64
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from torch import nn

from keeplora.evaluation.evaluate import evaluate
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track
from keeplora.report.html import Answered
from keeplora.runs.directory import RunDirectory

EXAMPLES = "examples.json"  # The questions that are shown, with small pictures.
NUMBER = 3  # Questions of a task that are shown: its first ones, so that nobody has chosen them.
THUMBNAIL = 160  # Pixels.


def evaluated(model: nn.Module, tasks: list[StreamTask], track: Track) -> tuple[list[float], bytes]:
    """Return a model's scores on some tasks, and what it answered as a file; nothing where tasks keep none of it."""
    lines: list[str] = []

    def keep(task: StreamTask, predictions: list[Any], references: list[Any]) -> None:
        told = (task.describe(*pair) for pair in zip(predictions, references, strict=True))
        lines.extend(json.dumps(one, ensure_ascii=False) + "\n" for one in told if one is not None)

    scores = evaluate(model, tasks, track=track, keep=keep)
    return scores, gzip.compress("".join(lines).encode(), mtime=0) if lines else b""


def write_untouched(directory: RunDirectory, tasks: Iterable[StreamTask], told: bytes) -> None:
    """Hand in what the untouched model answered, and the questions that are shown, for the next commit."""
    directory.write_predictions(told)
    shown = [
        {"task": task.name, **told, "image": _small(image) if image else ""}
        for task in tasks
        for told, image in task.examples(NUMBER)
    ]
    if shown:
        directory.write(EXAMPLES, (json.dumps(shown, indent=1, ensure_ascii=False) + "\n").encode())


def answered(directories: Sequence[RunDirectory]) -> list[Answered]:
    """Return the questions that some runs of one stream show, with what each run's model answered in the end."""
    first = directories[0]
    if EXAMPLES not in first.files:
        return []
    shown = json.loads(first.read(EXAMPLES))
    wanted = {(one["task"], one["id"]) for one in shown}
    columns = {"untouched": _given(first.predictions(), wanted)}
    for directory in directories:
        states = [told for index in range(directory.num_finished) if (told := directory.predictions(index))]
        if states:
            columns[directory.manifest["config"]["method"]] = _given(states[-1], wanted)
    return [
        Answered(
            task=one["task"],
            question=one["question"],
            expected=one["answer"],
            image=one["image"],
            given={column: given[one["task"], one["id"]] for column, given in columns.items()},
        )
        for one in shown
    ]


def _given(predictions: bytes, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return the answers of a file of predictions to some questions."""
    with gzip.open(io.BytesIO(predictions), "rt", encoding="utf-8") as lines:
        told: Iterable[dict[str, Any]] = (json.loads(line) for line in lines)
        return {key: one["prediction"] for one in told if (key := (one["task"], one["id"])) in wanted}


def _small(image: Image.Image) -> str:
    """Return an image for a page: no larger than it is shown."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return base64.b64encode(file.getvalue()).decode()
