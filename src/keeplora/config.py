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
    """Read a TOML file.

    Raises:
        ValueError: If the file is missing or not TOML; the message names the file and the line.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a TOML file") from None
    except (ValueError, RecursionError) as error:  # Numbers with too many digits, tables nested too deep.
        raise ValueError(f"{path} is not a TOML file: {error}") from None


def parse(kind: type[C], values: Mapping[str, Any], *, source: str, sources: Mapping[str, str] | None = None) -> C:
    """Make a configuration of `kind` from plain values, such as a parsed TOML table.

    Args:
        kind: A subclass of `Config`; tables become the configurations that its fields are of.
        values: The values by key.
        source: Where they come from, for messages.
        sources: Where single values come from, by their dotted key, if it is not there.

    Raises:
        ValueError: If a key is unknown, missing, or has a wrong value; the message names every one, and its source.
    """
    problems: list[tuple[str, str]] = []
    made = _made(kind, values, "", problems)
    if problems:
        by_source: dict[str, list[str]] = {}
        for key, problem in problems:
            by_source.setdefault((sources or {}).get(key, source), []).append(problem)
        lines = (f"{place}: " + "; ".join(dict.fromkeys(lines)) for place, lines in by_source.items())
        raise ValueError("; ".join(lines))
    assert made is not None, "nothing was made, and nothing is wrong"
    return made


def require(kind: type[C], value: object, place: str) -> C:
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


def read_json(content: bytes, path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: If it is none; the message names the file.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for every setting that differs, by its dotted name, and a single one for those of the tasks."""
    old, new = _flat(before), _flat(now)
    different = [
        path for path in sorted({*old, *new}) if old.get(path) != new.get(path) or (path in old) != (path in new)
    ]
    above = {path[:length] for path in different for length in range(len(path))}
    different = [  # A table that is empty on one side is named by what the other has in it.
        path for path in different if path not in above or {} not in (old.get(path), new.get(path))
    ]
    of_tasks = list(dict.fromkeys(path[1] for path in different if path[0] == "tasks" and len(path) > 1))
    phrases = [
        f"{'.'.join(path)} was {_shown(old, path)}, is {_shown(new, path)}"
        for path in different
        if path[0] != "tasks" or len(path) == 1
    ]
    if of_tasks:
        more = f" and {len(of_tasks) - 1} more" if len(of_tasks) > 1 else ""
        phrases.append(f"the benchmark's table of task {of_tasks[0]!r}{more} was another")
    return phrases


def _made(kind: type[C], values: Any, above: str, problems: list[tuple[str, str]]) -> C | None:
    """Make one configuration; what is wrong is appended to the problems, each with its dotted key."""
    if not isinstance(values, Mapping):
        key = above.removesuffix(".")
        problems.append((key, f"{key} = {values!r} must be a table, [{key}]"))
        return None
    known: dict[str, dataclasses.Field[Any]] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    num_before, ready = len(problems), {}
    for key in values:
        if key not in known:
            problems.append((above + key, f"unknown key {above + key!r}; known keys: {', '.join(known)}"))
    for key, field in known.items():
        if key in values:
            ready[key] = _ready(field, values[key], above + key, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append((above + key, f"the key {above + key!r} is missing"))
    if len(problems) > num_before:
        return None
    try:
        return kind(**ready)
    except ValueError as error:
        key = next((name for name in ready if str(error).startswith(name)), "")
        problems.append((above + key, above + str(error) if key else str(error)))
        return None


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
    """Return a value that has the type of its field, a list as a tuple and a text as a path where these are asked for.

    Raises:
        ValueError: If it has another type; the message names the field.
    """
    choices = get_args(field.type) if get_origin(field.type) is Literal else ()
    if choices and value not in choices:
        raise ValueError(f"{field.name} = {value!r} is unknown; choose from {', '.join(map(str, choices))}")
    members = list(_members(field.type))
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
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{field.name} = {value!r}: {first['msg']}") from None


def _configuration(kind: Any) -> type[Config] | None:
    """Return the configuration that a type is, or that a tuple is of."""
    return next((one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Config)), None)


def _members(kind: Any) -> Iterator[Any]:
    """Yield the types of a union, or the type itself, without what is demanded of them."""
    if get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _members(one)
    else:
        yield get_args(kind)[0] if get_origin(kind) is Annotated else kind


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    # Strict: "3" and True are no numbers.
    return TypeAdapter(cast(Any, kind), config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _flat(config: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return nested settings by their path; an empty table is a value too."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in config.items():
        path = (*above, key)
        flat |= _flat(value, path) if isinstance(value, dict) and value else {path: value}
    return flat


def _shown(flat: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> str:
    return repr(flat[path]) if path in flat else "missing"
