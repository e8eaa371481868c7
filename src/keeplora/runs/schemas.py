"""What the JSON files of a run must hold to be used: checked where they are read, so that damage is told by its place.

The hashes in `run.json` tell a file that changed; this tells one that was written by something else.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat

from keeplora.config import read_json, require


class _Measured(BaseModel, extra="allow", strict=True):
    seconds: FiniteFloat
    peak_memory_mb: FiniteFloat


class _Start(BaseModel, extra="allow", strict=True):
    """What `run.json` says of the untouched model."""

    zero_shot: list[FiniteFloat]
    model_digest: str
    start: dict[str, _Measured]


class _Task(BaseModel, extra="allow", strict=True):
    """What `task.json` says of a finished task; its certificate is checked by who reads it."""

    name: str
    scores: list[FiniteFloat]
    phases: dict[str, _Measured]
    certificate: Any
    merged: bool = True


class _Config(BaseModel, extra="allow", strict=True):
    """What `run.json` says of what is run, as far as it is read without a `RunConfig`."""

    benchmark: str
    model: str
    method: str
    seed: int
    evaluation: Literal["test", "validation"]
    more: list[str]
    tasks: dict[str, dict[str, Any]]
    train: dict[str, Any]
    options: dict[str, Any]


def require_start(manifest: dict[str, Any], path: Path) -> None:
    """Check what `run.json` says of the untouched model.

    Raises:
        ValueError: If something is missing or wrong.
    """
    _require_scores(require(_Start, manifest, str(path)).zero_shot, manifest["tasks"], path)


def require_config(config: dict[str, Any], tasks: list[str], path: Path) -> None:
    """Check what `run.json` says of what is run.

    Raises:
        ValueError: If something is missing or wrong.
    """
    found = list(require(_Config, config, str(path)).tasks)
    if found != tasks:
        raise ValueError(f"{path} is damaged or not of keeplora: its tasks are {tasks}, its tables those of {found}")


def read_task(content: bytes, tasks: list[str], path: Path) -> dict[str, Any]:
    """Read the `task.json` of a finished task of a stream.

    Raises:
        ValueError: If something is missing or wrong; the message names the file.
    """
    details = read_json(content, path)
    _require_scores(require(_Task, details, str(path)).scores, tasks, path)
    return dict(details)


def _require_scores(scores: list[float], tasks: list[str], path: Path) -> None:
    if len(scores) != len(tasks):
        raise ValueError(f"{path} is damaged or not of keeplora: it has {len(scores)} scores for {len(tasks)} tasks")
