"""Flags made of configurations: one for each field, without a default, so that one knows what was given."""

import ast
import inspect
import textwrap
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, Union, cast, get_args, get_origin

import tyro

from keeplora.methods.base import MethodConfig
from keeplora.methods.registry import METHODS
from keeplora.registry import load_extensions
from keeplora.runs.config import RunConfig, Sourced, resolve
from keeplora.training.trainer import TrainConfig


def flag(kind: Any, text: str, hint: str = "(optional)") -> Any:
    """Return the annotation of a flag that has no default."""
    return Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint)]


def run_flags(more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the annotations of a command whose arguments are the settings of a run, in three groups.

    Args:
        more: Further flags.
    """
    skipped = ("train", "options", "sources")
    settings = _flags((one for one in fields(RunConfig) if one.name not in skipped), RunConfig)
    groups = {
        "settings": settings | dict(more),
        "train": _flags(fields(TrainConfig), TrainConfig),
        "method": _options(),
    }
    return {
        name: tyro.conf.OmitArgPrefixes[TypedDict(name.capitalize(), flags, total=False)]  # type: ignore[operator, misc]
        for name, flags in groups.items()
    }


def sourced(**given: Mapping[str, Any]) -> list[Sourced]:
    """Return each flag that was given as a table of its own, which its name is the source of."""
    settings, train, options = (dict(given.get(name) or {}) for name in ("settings", "train", "options"))
    tables = [(name, {name: value}) for name, value in settings.items()]
    tables += [(name, {"train": {name: value}}) for name, value in train.items()]
    tables += [(name, {"options": {name: value}}) for name, value in options.items()]
    return [(f"--{name.replace('_', '-')}", table) for name, table in tables]


def resolve_flags(file: Sourced | None, **given: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run that flags, before a file, describe."""
    return resolve(*sourced(**given), *([file] if file else []))


def _options() -> dict[str, Any]:
    """Return a flag for every option of every method; one that several have says of whom it is."""
    load_extensions()
    methods = {RunConfig.method: METHODS[RunConfig.method], **METHODS}
    common = {field.name for field in fields(MethodConfig)}
    owners: dict[str, dict[str, Field[Any]]] = {}
    for name, method in methods.items():
        for field in fields(method.Config):
            owners.setdefault(field.name, {})[name] = field
    flags: dict[str, Any] = {}
    for name, of in owners.items():
        (first, field), *others = of.items()
        differ = [f"{method} {_value(one)}" for method, one in others if _value(one) != _value(field)]
        text = ("" if name in common else f"({', '.join(of)}) ") + _docs(cast(Hashable, methods[first].Config))[name]
        flags[name] = flag(_without_none(field.type), text + (f" {', '.join(differ)}." if differ else ""), _hint(field))
    return flags


def _flags(wanted: Iterable[Field[Any]], kind: type[Any]) -> dict[str, Any]:
    return {
        field.name: flag(_without_none(field.type), _docs(cast(Hashable, kind))[field.name], _hint(field))
        for field in wanted
    }


def _without_none(kind: Any) -> Any:
    """Return a type without None: a flag that is given has a value."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return Union[tuple(one for one in get_args(kind) if one is not NoneType)]  # noqa: UP007 (a tuple of types)


def _hint(field: Field[Any]) -> str:
    """Say what a setting is if nobody gives it."""
    value = _value(field)
    return f"(default: {value})" if value else "(optional)"


def _value(field: Field[Any]) -> str:
    """Return a field's default as one would give it."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, dict):
        default = tuple(word for pair in default.items() for word in pair)
    return "" if default is None else " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


@cache
def _docs(kind: Any) -> dict[str, str]:
    """Return the text below each field of a dataclass, as its source has it."""
    docs: dict[str, str] = {}
    for one in filter(is_dataclass, reversed(kind.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type, one)))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs
