"""Flags made of configurations: one for each field, without a default, so that one knows what was given."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, Union, cast, get_args, get_origin

import tyro

from keeplora.config import read_toml
from keeplora.methods.base import ABLATION, MethodConfig
from keeplora.methods.registry import METHODS
from keeplora.registry import load_extensions
from keeplora.runs.config import RunConfig, Sourced
from keeplora.training.trainer import TrainConfig


def flag(kind: Any, text: str, hint: str = "(optional)") -> Any:
    """Return the annotation of a flag that has no default."""
    return Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint)]


def run_flags(**more: Any) -> dict[str, Any]:
    """Return the annotations of a command whose arguments are the settings of a run, and `more`, in groups."""
    groups = {
        "settings": _flags(RunConfig, without=("train", "options", "sources")) | more,
        "train": _flags(TrainConfig),
        **_options(),
    }
    return {
        name: tyro.conf.OmitArgPrefixes[TypedDict(name.capitalize(), flags, total=False)]  # type: ignore[operator, misc]
        for name, flags in groups.items()
    }


def sourced(settings: Mapping[str, Any], train: Mapping[str, Any], options: Mapping[str, Any]) -> list[Sourced]:
    """Return each flag that was given as a table of its own, with its name as the source, before --config's file."""
    own = dict(settings)
    file = own.pop("config", None)
    tables = [(name, {name: value}) for name, value in own.items()]
    tables += [(name, {"train": {name: value}}) for name, value in train.items()]
    tables += [(name, {"options": {name: value}}) for name, value in options.items()]
    flags: list[Sourced] = [(f"--{name.replace('_', '-')}", table) for name, table in tables]
    return [*flags, (str(file), read_toml(file))] if file else flags


def _options() -> dict[str, dict[str, Any]]:
    """Return a flag for every option of every method, which says of whom it is, in groups.

    First those of the default method, then what ablations of it need, then those of the other methods.
    """
    load_extensions()
    owners: dict[str, dict[str, Field[Any]]] = {}
    docs: dict[str, str] = {}
    for name, method in {RunConfig.method: METHODS[RunConfig.method], **METHODS}.items():
        docs = _docs(method.Config) | docs
        for field in fields(method.Config):
            owners.setdefault(field.name, {})[name] = field
    common = _docs(MethodConfig)
    groups: dict[str, dict[str, Any]] = {"method": {}, "ablations": {}, "others": {}}
    for name, of in owners.items():
        field = next(iter(of.values()))
        differ = [f"{method} {_default(of[method])}" for method in of if _default(of[method]) != _default(field)]
        text = ("" if name in common else f"({', '.join(of)}) ") + docs[name]
        group = "ablations" if field.metadata == ABLATION else "method" if RunConfig.method in of else "others"
        groups[group][name] = _flag(field, f"{text} {', '.join(differ)}." if differ else text)
    return groups


def _flags(kind: type[Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    docs = _docs(kind)
    return {field.name: _flag(field, docs[field.name]) for field in fields(kind) if field.name not in without}


def _flag(field: Field[Any], text: str) -> Any:
    """Return the flag of a field: its type without None, since a flag that is given has a value, and its default."""
    kind: Any = field.type
    if get_origin(kind) in (Union, UnionType):
        kind = Union[tuple(member for member in get_args(kind) if member is not NoneType)]  # noqa: UP007 (a tuple)
    default = _default(field)
    return flag(kind, text, f"(default: {default})" if default else "(optional)")


def _default(field: Field[Any]) -> str:
    """Return a field's default as one would give it."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if isinstance(default, dict):
        default = tuple(word for pair in default.items() for word in pair)
    return "" if default is None else " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _docs(kind: Any) -> dict[str, str]:
    """Return the text below each field of a dataclass, as its source has it."""
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type, base)))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs
