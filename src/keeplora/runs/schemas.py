"""What the JSON files of a run must hold to be used: checked where they are read, so that damage is told by its place.

The hashes in `run.json` tell a file that changed; this tells one that was written by something else.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=0)]


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


class _Adapter(BaseModel, extra="allow", strict=True):
    """The settings of an adapter that differ from PEFT's own."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: FiniteFloat
    rank_pattern: dict[str, PositiveInt]
    alpha_pattern: dict[str, FiniteFloat]
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None
    base_model_name_or_path: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None


class Layer(BaseModel, extra="allow", strict=True):
    """What a certificate says of the room in one layer."""

    residual_dims: Count
    protected_dims: Count
    rank: Count


K = TypeVar("K")


def require(kind: type[K], value: object, place: str) -> K:
    """Check plain values, and return what they are of.

    Raises:
        ValueError: If they do not have the form; the message names `place` and the first key that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place} is damaged or not of keeplora: {key + ': ' if key else ''}{first['msg']}") from None


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


def read_json(content: bytes, path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: If it is none; the message names the file.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_task(content: bytes, tasks: list[str], path: Path) -> dict[str, Any]:
    """Read the `task.json` of a finished task of a stream.

    Raises:
        ValueError: If something is missing or wrong; the message names the file.
    """
    details = read_json(content, path)
    _require_scores(require(_Task, details, str(path)).scores, tasks, path)
    return dict(details)


def read_adapter_config(content: bytes, plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read the `adapter_config.json` of an adapter; `plain` are the library's own settings.

    Raises:
        ValueError: If something is missing, unknown or of another type; the message names the file and the key.
    """
    values = read_json(content, path)
    require(_Adapter, values, str(path))
    for key, value in values.items():
        if key not in _Adapter.model_fields and (key not in plain or type(value) is not type(plain[key])):
            raise ValueError(f"{path} is damaged or not of keeplora: {key} = {value!r}")
    return dict(values)


def _require_scores(scores: list[float], tasks: list[str], path: Path) -> None:
    if len(scores) != len(tasks):
        raise ValueError(f"{path} is damaged or not of keeplora: it has {len(scores)} scores for {len(tasks)} tasks")
