"""A task, examples and a loss, is all that the methods see of a user's problem; a benchmark is a file that names some.

Subclass `Task`, or hand any object with the same attributes: nothing in it is about images or text.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.config import Config, parse, read_toml

Batch = Any

BENCHMARKS = Path(__file__).parent / "data" / "benchmarks"

LONGEST_NAME = 200
"""Bytes of a task's name; file systems end at 255, and other names are made of it."""


class DeferredGradient:
    """What a task computed once for many batches, and the leaf that takes its place in their losses.

    Gradients with respect to the leaf add up, so that what lies behind it is differentiated once for all batches.
    """

    def __init__(self, made: Tensor) -> None:
        self.made = made
        self.leaf = made.detach().requires_grad_()
        self.weight = 0.0
        self.gradient = torch.zeros_like(made, dtype=torch.promote_types(made.dtype, torch.float32))

    def add(self, gradient: Tensor | None, weight: float) -> None:
        """Add the gradient of a loss with respect to the leaf."""
        if gradient is not None:
            self.gradient.add_(gradient.to(self.gradient.dtype), alpha=weight)
            self.weight += weight

    def take(self) -> None:
        """Add what a backward pass has left at the leaf."""
        self.add(self.leaf.grad, 1.0)
        self.leaf.grad = None

    def backward(self) -> None:
        """Send what was added on to what lies behind."""
        if self.weight:
            torch.autograd.backward(self.made, self.gradient.to(self.made.dtype))

    def surrogate(self) -> Tensor:
        """Return a scalar whose gradients are the weighted mean of what the losses' would have been."""
        return (self.made * (self.gradient / max(self.weight, 1)).to(self.made.dtype)).sum()


class Task:
    """One task of a stream. A subclass gives `batches` and `loss`; the rest has defaults."""

    name: str

    def batches(self) -> Iterable[Batch]:
        """Return the training batches, in an order of your choice; a sized iterable if a share of them is asked for."""
        raise NotImplementedError(f"{type(self).__name__} must define batches()")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch as a scalar: the mean over its examples."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch)")

    def weight(self, batch: Batch) -> int:
        """Return how many examples a batch holds: the length of the first tensor in it, unless overridden."""
        for value in _leaves(batch):
            if isinstance(value, Tensor) and value.dim() > 0:
                return len(value)
        raise ValueError(f"task {self.name!r}: a batch holds no tensor; override weight(batch)")

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Say which rows of a layer's input are real: True for real, False for padding, shaped as the input less d_in.

        None, the default, means that all rows are real. Padding rows never enter the statistics.
        """
        return None

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the merge check compares, logits for instance; the loss unless overridden."""
        return self.loss(model, batch)

    def start_head(self, model: nn.Module) -> nn.Module:
        """Make the task's own classifier for KeepLoRA+, and use it in `loss` from now on."""
        raise ValueError(f"task {self.name!r} has no classes to build a classifier from; set classifier='none'")

    def load_head(self, weights: dict[str, Tensor]) -> nn.Module:
        """Make the task's own classifier from saved weights, and use it in `loss` and `outputs` from now on."""
        raise ValueError(f"task {self.name!r} has a classifier, but no load_head(weights) to take it up again")

    def generators(self) -> tuple[torch.Generator, ...]:
        """Return what the order of the batches is drawn from, other than torch's own generator."""
        return ()

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        """Return the batches that one may be cut into, so that its loss is the mean of theirs by `num_examples`.

        Read by gradients, second moments, evaluation, and training where one process trains a model as it is.
        """
        return [batch]

    def sample(self, batch: Batch) -> Batch:
        """Return what of a batch the merge check compares the outputs of: its first part, unless overridden."""
        return next(iter(self.micro_batches(batch)))

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        """Promise that the weights stay as they are inside: a task may keep what depends on them alone.

        What it keeps with a gradient it hands out, at any time inside, as a stand-in, and uses its leaf.
        """
        yield ()


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Config):
    """One task of a benchmark file."""

    name: str
    """Name of the task, and of its folder in a run."""
    path: Path
    """Folder or zip archive with SPLIT/CLASS/IMAGE, or a Hugging Face dataset; relative to the benchmark file."""
    reader: str = "folder"
    """How to read `path`: folder (a zip archive is one too) or dataset."""
    template: str = "a photo of a {}."
    """The prompt of a class; {} is replaced by its name."""
    class_names: dict[str, str] = field(default_factory=dict)
    """The name to use in the prompt, for classes whose stored name does not read well."""
    image_column: str = "image"
    """Column of the images (reader dataset)."""
    label_column: str = "label"
    """Column of the labels (reader dataset)."""
    epochs: int | None = None
    """Number of epochs of this task, where it differs from the run's."""
    hub: str = ""
    """`path` as it was written, for a dataset of the hub; filled in."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith(".") or not self.name.isprintable():
            raise ValueError(f"task name {self.name!r} cannot name a folder")
        if len(self.name.encode(errors="replace")) > LONGEST_NAME:
            raise ValueError(f"task name {self.name[:20] + '...'!r} is too long for a folder; give a shorter one")
        if "{}" not in self.template:
            raise ValueError(f"task {self.name!r}: template {self.template!r} has no {{}} for the class name")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"task {self.name!r}: epochs = {self.epochs} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CompareBudget(Config):
    """What a comparison spends on each method: epochs, and settings to choose from on the validation splits."""

    epochs: int | None = None
    """Epochs of each task; those of [defaults.train] if not given."""
    search_tasks: int | None = None
    """Learn this many tasks, the first ones, in each run of the search; all if not given."""
    learning_rate: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates to try first, the same for every method."""
    search: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """For a method by its name: values of its settings to try next, at the best learning rates."""
    rates_kept: int = 2
    """At how many of the best learning rates they are tried."""
    common: dict[str, Any] = field(default_factory=dict)
    """Options that every method gets, such as the rank; otherwise its own defaults."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For a method by its name: options that it gets instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.learning_rate
        if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"learning_rate = {list(rates)} must list positive numbers")
        if len(set(rates)) < len(rates):
            raise ValueError(f"learning_rate = {list(rates)} lists a number twice")
        for name in ("epochs", "search_tasks", "rates_kept"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Config):
    """A stream of tasks, in the order they are learned."""

    name: str
    description: str = ""
    tasks: tuple[TaskSpec, ...]
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that suit this benchmark: a table [defaults.train], and one for a method by its name."""
    compare: CompareBudget = field(default_factory=CompareBudget)
    """What `keeplora compare` spends on each method."""

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("a benchmark needs at least one [[tasks]]")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks are named {sorted(twice)[0]!r}; names must differ")


def read_benchmark(name: str) -> Benchmark:
    """Read a benchmark that comes with the package by its name, or any by the path of its TOML file.

    Raises:
        ValueError: If there is none, or the file is wrong; the message names the key or lists the known names.
    """
    path = Path(name) if name.endswith(".toml") else BENCHMARKS / f"{name}.toml"
    if not name.endswith(".toml") and not path.is_file():
        known = ", ".join(sorted(file.stem for file in BENCHMARKS.glob("*.toml")))
        raise ValueError(f"unknown benchmark {name!r}; known: {known}, or give the path of a .toml file")
    values = read_toml(path)
    if any(isinstance(task, dict) and "hub" in task for task in _as_list(values.get("tasks"))):
        raise ValueError(f"{path}: tasks have no key 'hub'; give the name of a dataset as path")
    benchmark = parse(Benchmark, {"name": path.stem} | values, source=str(path))
    tasks = tuple(replace(task, path=path.parent / task.path, hub=str(task.path)) for task in benchmark.tasks)
    return replace(benchmark, tasks=tasks)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move every tensor of a batch (nested in dicts, lists or tuples) to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _leaves(batch: Batch) -> Iterator[Any]:
    if isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(value)
    else:
        yield batch
