"""Configurations: frozen dataclasses that check themselves, and the TOML and JSON files that values come from.

A configuration lives beside what it configures; this module only knows how to read and check one.
"""

import dataclasses
import json
import tomllib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

C = TypeVar("C")

FILLED_IN = {"filled_in": True}  # Marks a field that nobody sets.

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: a value of the wrong type is an error, however the configuration is made."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file, or raise a `ValueError` that names the file, and the line where it is not TOML."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # Numbers with too many digits, tables nested too deep.
        raise ValueError(f"{path} is not a TOML file: {error}") from None


def parse(kind: type[C], values: Mapping[str, Any], *, source: str, sources: Mapping[str, str] | None = None) -> C:
    """Make a configuration of `kind` from plain values, such as a parsed TOML table; inner tables become inner ones.

    Raises a `ValueError` that names every unknown or missing key and every wrong value with its source: that of its
    dotted key in `sources`, or else `source`.
    """
    problems: list[tuple[str, str]] = []
    made = _made(kind, values, "", problems)
    if made is None:
        by_source: dict[str, dict[str, None]] = {}
        for key, problem in problems:
            by_source.setdefault((sources or {}).get(key, source), {})[problem] = None
        raise ValueError("; ".join(f"{place}: {'; '.join(found)}" for place, found in by_source.items()))
    return made


def require(kind: type[C], value: object, place: str) -> C:
    """Return plain values as what they are of, or raise a `ValueError` that names `place` and the first wrong key."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place} is damaged or not of keeplora: {key + ': ' if key else ''}{first['msg']}") from None


def read_json(content: bytes, path: Path) -> Any:
    """Read JSON, or raise a `ValueError` that names the file."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for every setting that differs, by its dotted name, and a single one for those of the tasks."""
    phrases: list[str] = []
    tasks: dict[str, None] = {}
    for path, *values in _changed(before, now, ()):
        if path[0] == "tasks" and len(path) > 1:
            tasks[path[1]] = None
        else:
            old, new = ("missing" if value is MISSING else repr(value) for value in values)
            phrases.append(f"{'.'.join(path)} was {old}, is {new}")
    if tasks:
        more = f" and {len(tasks) - 1} more" if len(tasks) > 1 else ""
        phrases.append(f"the benchmark's table of task {next(iter(tasks))!r}{more} was another")
    return phrases


def _changed(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the path and both values of every setting that differs; a table differs in what is inside."""
    before, now = (value if isinstance(value, dict) else {} for value in (old, new))
    keys = sorted({*before, *now})
    old, new = MISSING if before else old, MISSING if now else new
    if old != new and not (keys and {} in (old, new)):
        yield path, old, new
    for key in keys:
        yield from _changed(before.get(key, MISSING), now.get(key, MISSING), (*path, key))


def _made(kind: type[C], values: Any, above: str, problems: list[tuple[str, str]]) -> C | None:
    """Make one configuration; what is wrong is appended to the problems, each with its dotted key."""
    if not isinstance(values, Mapping):
        key = above.removesuffix(".")
        problems.append((key, f"{key} = {values!r} must be a table, [{key}]"))
        return None
    known: dict[str, dataclasses.Field[Any]] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    found: list[tuple[str, str]] = []
    for key in values:
        if key not in known:
            found.append((above + key, f"unknown key {above + key!r}; {_hint(known, key)}"))
    ready = {}
    for key, field in known.items():
        if key in values:
            ready[key] = _ready(field, values[key], above + key, found)
        elif field.default is MISSING and field.default_factory is MISSING:
            found.append((above + key, f"the key {above + key!r} is missing"))
    problems += found
    try:
        return None if found else kind(**ready)
    except ValueError as error:
        key = next((name for name in ready if str(error).startswith(name)), "")
        problems.append((above + key, above + str(error) if key else str(error)))
        return None


def _hint(known: dict[str, dataclasses.Field[Any]], key: str) -> str:
    """Say in which table an unknown key belongs, or else which keys there are, without those that are filled in."""
    for name, field in known.items():
        inner = _configuration(field.type)
        if inner and key in {one.name for one in fields(inner)}:
            return f"it belongs into the table [{name}]"
    return f"known keys: {', '.join(name for name, field in known.items() if 'filled_in' not in field.metadata)}"


def _ready(field: dataclasses.Field[Any], value: Any, key: str, problems: list[tuple[str, str]]) -> Any:
    """Return a value as its field has it: a table as a configuration, otherwise checked."""
    inner = _configuration(field.type)
    if inner and get_origin(field.type) is tuple and isinstance(value, list):
        return tuple(_made(inner, item, f"{key}.{number}.", problems) for number, item in enumerate(value))
    if inner and not isinstance(value, inner):
        return _made(inner, value, f"{key}.", problems)
    try:
        return _checked(field, value)
    except ValueError as error:
        problems.append((key, key.removesuffix(field.name) + str(error)))
        return None


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a value of its field's type, a list as a tuple and a text as a path where asked for, or name the field."""
    if get_origin(field.type) is Literal and value not in (choices := get_args(field.type)):
        raise ValueError(f"{field.name} = {value!r} is unknown; choose from {', '.join(map(str, choices))}")
    members = _members(field.type)
    if isinstance(value, str) and Path in members and str not in members:
        value = Path(value)
    if isinstance(value, list) and any(get_origin(one) is tuple for one in members):
        value = tuple(value)
    if isinstance(value, str) and get_origin(field.type) is tuple:
        raise ValueError(f"{field.name} = {value!r} must be a tuple of names, such as ({value!r},)")
    if inner := _configuration(field.type):
        if all(isinstance(one, inner) for one in (value if isinstance(value, tuple) else (value,))):
            return value
        raise ValueError(f"{field.name} = {value!r}: Input should be of {inner.__name__}")
    try:
        return _adapter(cast(Hashable, field.type)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{field.name} = {value!r}: {error.errors(include_url=False)[0]['msg']}") from None


def _configuration(kind: Any) -> type[Config] | None:
    """Return the configuration that a type is, or that a tuple is of."""
    return next((one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Config)), None)


def _members(kind: Any) -> list[Any]:
    """Return the types of a union, or the type itself, without what is demanded of them."""
    if get_origin(kind) in (Union, UnionType):
        return [member for one in get_args(kind) for member in _members(one)]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind]


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    # Strict: "3" and True are no numbers.
    return TypeAdapter(cast(Any, kind), config=ConfigDict(strict=True, arbitrary_types_allowed=True))
