"""Configurations: frozen dataclasses that are checked once, and the TOML files they come from.

A configuration lives beside what it configures; this module only knows how to read one.
"""

import json
import tomllib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: an unknown key is an error, and so is a value of the wrong type."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=False)

    def __post_init__(self) -> None:
        for field in fields(self):
            choices = get_args(field.type) if get_origin(field.type) is Literal else ()
            value = getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} = {value!r} is unknown; choose from {', '.join(choices)}")


C = TypeVar("C")


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


def parse(kind: type[C], values: dict[str, Any], *, source: str) -> C:
    """Make a configuration of `kind` from plain values, such as a parsed TOML table.

    Raises:
        ValueError: If a key is unknown, missing, or has a wrong value; one line for each, naming `source`.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_line(kind, problem) for problem in error.errors(include_url=False)]
        raise ValueError(f"{source}: " + "; ".join(dict.fromkeys(lines))) from None


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


def _line(kind: type, problem: Any) -> str:
    # Pydantic appends the name of the union member it tried, which is not a key of the file.
    place = ".".join(str(part) for part in problem["loc"] if part not in ("float", "dict[str,float]"))
    if problem["type"] == "unexpected_keyword_argument":
        owner = _owner(kind, problem["loc"][:-1])
        known = ", ".join(field.name for field in fields(owner)) if is_dataclass(owner) else ""
        return f"unknown key {place!r}" + (f"; known keys: {known}" if known else "")
    if problem["type"] == "missing":
        return f"the key {place!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place} = {problem['input']!r}: {message}" if place else message


def _owner(kind: type, path: tuple[Any, ...]) -> Any:
    """Return the dataclass that the last key of `path` belongs to."""
    owner: Any = kind
    for part in path:
        if isinstance(part, str) and part in getattr(owner, "__dataclass_fields__", {}):
            owner = owner.__dataclass_fields__[part].type
        owner = getattr(owner, "__args__", (owner,))[0]
    return owner
