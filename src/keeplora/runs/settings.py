"""Where a run's settings come from: what was given, before the benchmark's defaults, before the library's."""

import dataclasses
from typing import Any

from keeplora.config import parse
from keeplora.methods.registry import find_method, known_methods, method_behind
from keeplora.runs.config import RunConfig
from keeplora.task import read_benchmark


def run_defaults(benchmark: str, method: str, values: dict[str, Any], source: str) -> RunConfig:
    """Return a run's settings: the given values before the benchmark's own defaults before the library's.

    Raises:
        ValueError: If the benchmark or the method is unknown, or a value is wrong.
    """
    kind, variant = find_method(method)
    defaults = read_benchmark(benchmark).defaults
    if unknown := sorted(set(defaults) - {"train", *known_methods()}):
        raise ValueError(f"benchmark {benchmark!r}: [defaults.{unknown[0]}] is neither train nor a method")
    train: dict[str, Any] = dict(defaults.get("train", {}))
    options: dict[str, Any] = {}
    for table in (defaults.get(method_behind(method), {}), variant, defaults.get(method, {})):
        options |= {key: value for key, value in table.items() if key != "train"}
        if not isinstance(more := table.get("train", {}), dict):
            raise ValueError(f"benchmark {benchmark!r}: train = {more!r} in the defaults of a method must be a table")
        train |= more
    train |= _table(values, "train", source)
    options |= _table(values, "options", source)
    parsed = parse(RunConfig, {**values, "train": train, "benchmark": benchmark, "method": method}, source=source)
    return dataclasses.replace(parsed, options=parse(kind.Config, options, source=f"{source} [options]"))


def _table(values: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    """Take a table out of a file's values."""
    table = values.pop(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"{source}: {key} = {table!r} must be a table, [{key}]")
    return table
