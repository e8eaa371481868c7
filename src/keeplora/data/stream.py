"""The stream of tasks that benchmarks, an order, and a choice of tasks make."""

import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

from keeplora.data.benchmark import TaskSpec, read_benchmark

Names = tuple[str, ...]


def stream_of(
    benchmark: str, *, order: int = 0, first_tasks: int | None = None, more: Names = (), without: Names = ()
) -> tuple[TaskSpec, ...]:
    """Return the tasks of a stream: those of a benchmark, given by name or path, then those of more benchmarks.

    Order 0 is the benchmark's own, k the k-th random one, each another than those before; of it come the first tasks. A
    task of the same name and data comes once, one that is named in `without` not at all.
    """
    specs = read_benchmark(benchmark).tasks
    if order >= (num_orders := math.factorial(len(specs))):
        raise ValueError(f"order = {order}: {len(specs)} tasks have only the orders 0 to {num_orders - 1}")
    stream = {specs[i].name: specs[i] for i in _permutation(order, len(specs))[:first_tasks]}
    for another in more:
        for spec in read_benchmark(another).tasks:
            if resolved(stream.setdefault(spec.name, spec)) != resolved(spec):
                raise ValueError(
                    f"benchmark {another!r} has another task {spec.name!r} than the stream before it; rename one"
                )
    if unknown := [name for name in without if name not in stream]:
        raise ValueError(f"without = {unknown[0]!r} is no task of the stream; its tasks are {', '.join(stream)}")
    if not (left := tuple(spec for name, spec in stream.items() if name not in without)):
        raise ValueError(f"without = {list(without)} leaves no task to learn")
    return left


def resolved(spec: TaskSpec) -> TaskSpec:
    """Return a task in the form in which it can be compared with one of another file."""
    return replace(spec, path=spec.path.resolve(), hub="")


def absolute(benchmark: str) -> str:
    """Return a benchmark's name, or its path so that it can be found from anywhere."""
    return str(Path(benchmark).resolve()) if benchmark.endswith(".toml") else benchmark


@cache
def _permutation(number: int, size: int) -> tuple[int, ...]:
    """Return 0 to size - 1 in the number-th distinct order; number 0 is the identity, the others are random."""
    found = {tuple(range(size)): None}
    seed = 0
    while len(found) <= number:
        seed += 1
        places = list(range(size))
        random.Random(seed).shuffle(places)
        found[tuple(places)] = None
    return list(found)[number]
