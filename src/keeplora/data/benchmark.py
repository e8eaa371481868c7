"""A benchmark: a TOML file that names the tasks of a stream, and settings that suit them."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from pydantic import PositiveInt

from keeplora.config import FILLED_IN, Config, Share, parse, read_toml

BENCHMARKS = Path(__file__).parent / "benchmarks"

LONGEST_NAME = 200  # Bytes of a task's name; file systems end at 255, and other names are made of it.


IMAGE_READERS, CHAT_READERS = ("folder", "dataset"), ("llava", "messages", "question_answer")
OF_IMAGES = ("template", "class_names", "label_column")
OF_CHATS = (
    "files", "image_root", "question_template", "question_column", "answer_column", "chat_template", "suffix",
    "yes_no_suffix", "max_new_tokens", "max_length", "loss_over", "features_of",
)  # fmt: skip
"""Keys of a task that only readers of images, or only those of conversations, have a use for."""


@dataclass(frozen=True, kw_only=True)
class TaskSpec(Config):
    """One task of a benchmark file."""

    name: str  # Name of the task, and of its folder in a run.
    path: Path
    """Folder or zip archive with SPLIT/CLASS/IMAGE, or a Hugging Face dataset; relative to the benchmark file."""
    reader: str = "folder"  # How to read `path`: folder (a zip archive is one too) or dataset.
    template: str | tuple[str, ...] = "a photo of a {}."
    """The prompt of a class, {} stands for its name; of several, the mean of their text features is a class's."""
    class_names: dict[str, str] = field(default_factory=dict)
    """The name to use in the prompt, for classes whose stored name does not read well."""
    image_column: str = "image"  # Column of the images (reader dataset).
    label_column: str = "label"  # Column of the labels (reader dataset).
    files: dict[str, str] = field(default_factory=dict)
    """File of each split inside `path`, where it is not SPLIT.json or SPLIT.jsonl (readers of conversations)."""
    image_root: str = ""  # Folder inside `path` that paths of images are relative to (readers of conversations).
    question_column: str = "question"  # Column of the questions (reader question_answer).
    question_template: str = ""
    """A question put together from columns, {name} stands for each (reader question_answer)."""
    answer_column: str = "answer"  # Column of the answers (reader question_answer).
    chat_template: str = ""  # Chat format: a name such as vicuna_v1, or a .jinja file; the model's own if not given.
    suffix: str = ""  # What is put behind a question when the task is evaluated.
    yes_no_suffix: str = ""  # What is put there instead where the answer is yes or no.
    max_new_tokens: PositiveInt = 64  # The most tokens of an answer.
    max_length: PositiveInt = 2048  # The most tokens of a conversation.
    loss_over: Literal["answer_tokens", "examples"] = "answer_tokens"
    """What the loss of conversations is the mean over: all answer tokens, or examples, of the mean of each."""
    features_of: Literal["all", "text", "answers"] = "all"
    """Positions whose inputs are protected after a task of conversations: all, those of no image, those of answers."""
    metric: str = ""  # What its predictions are scored by; if not given, accuracy of classes, exact_match of answers.
    epochs: PositiveInt | None = None  # Number of epochs of this task, where it differs from the run's.
    config: str = ""  # Configuration of a dataset of the hub that has several (reader dataset).
    test_share: Share = 0.0  # Share of the training images to test on, with a fixed seed, where there is no test split.
    max_megapixels: PositiveInt = 80  # A larger image is an error.
    max_file_mb: PositiveInt = 256  # So is a larger file; of an archive or a dataset, one that is larger unpacked.
    hub: str = field(default="", metadata=FILLED_IN)  # `path` as it was written, for a dataset of the hub.
    is_probe: bool = field(default=False, metadata=FILLED_IN)  # Whether it is evaluated only: it needs no train split.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or "/" in self.name or self.name.startswith(".") or not self.name.isprintable():
            raise ValueError(f"task name {self.name!r} cannot name a folder")
        if len(self.name.encode(errors="replace")) > LONGEST_NAME:
            raise ValueError(f"task name {self.name[:20] + '...'!r} is too long for a folder; give a shorter one")
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"task {self.name!r}: template {template!r} has no {{}} for the class name")
        if not self.templates or len(set(self.templates)) < len(self.templates):
            raise ValueError(f"task {self.name!r}: template = {list(self.templates)}: give one or more, each once")
        others = {**dict.fromkeys(CHAT_READERS, OF_IMAGES), **dict.fromkeys(IMAGE_READERS, OF_CHATS)}
        defaults = {one.name: one.default for one in fields(self)} | {"class_names": {}, "files": {}}
        for key in others.get(self.reader, ()):
            if getattr(self, key) != defaults[key]:
                kind = "conversations" if key in OF_CHATS else "classes of images"
                raise ValueError(f"task {self.name!r}: {key} is for {kind}, which reader {self.reader!r} does not give")
        composed = {normalize("NFC", name): shown for name, shown in self.class_names.items()}
        object.__setattr__(self, "class_names", composed)

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates, however many."""
        return (self.template,) if isinstance(self.template, str) else self.template

    def prompts(self, class_names: Iterable[str]) -> list[str]:
        """Return the prompts of classes: one after the other all those of the first, of the second, and so on."""
        return [template.replace("{}", name) for name in class_names for template in self.templates]

    def require_size(self, num_bytes: int) -> None:
        """Raise ValueError if a file is larger than the task allows."""
        if num_bytes > self.max_file_mb * 10**6:
            raise ValueError(f"it has {num_bytes / 1e6:,.0f} MB, more than the task's max_file_mb = {self.max_file_mb}")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Config):
    """A stream of tasks, in the order they are learned."""

    name: str
    description: str = ""
    tasks: tuple[TaskSpec, ...]
    orders: tuple[list[str], ...] = ()
    """Further orders that the benchmark is known for, as names of its tasks: the orders 1, 2 and so on."""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that suit this benchmark: a table [defaults.train], and one for a method by its name."""
    compare: dict[str, Any] = field(default_factory=dict)  # What `keeplora compare` spends on each method.
    common: dict[str, Any] = field(default_factory=dict)  # Keys of every task, unless it has its own.
    probes: tuple[TaskSpec, ...] = ()
    """Tasks that are never learned, but evaluated before and after every task: what the model could do in general."""
    source: str = ""  # Where the data are to be had, of a benchmark that comes without them, and how they lie.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("a benchmark needs at least one [[tasks]]")
        names = [task.name for task in (*self.tasks, *self.probes)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two tasks are named {min(twice)!r}; names must differ")
        own = sorted(task.name for task in self.tasks)
        if odd := [number for number, order in enumerate(self.orders, 1) if sorted(order) != own]:
            raise ValueError(f"order {odd[0]} of orders does not name each of the tasks once: {', '.join(own)}")


def read_benchmark(name: str, data: Path | None = None) -> Benchmark:
    """Read a benchmark that comes with the package by its name, or any by the path of its TOML file.

    Paths of tasks are relative to `data`, or to the file if that is not given.
    """
    path = Path(name) if name.endswith(".toml") else BENCHMARKS / f"{name}.toml"
    if not name.endswith(".toml") and not path.is_file():
        known = ", ".join(sorted(file.stem for file in BENCHMARKS.glob("*.toml")))
        raise ValueError(f"unknown benchmark {name!r}; known: {known}, or give the path of a .toml file")
    values = {"name": path.stem} | read_toml(path)
    common = values.get("common", {})
    for key in ("tasks", "probes"):
        if isinstance(common, dict) and isinstance(tables := values.get(key), list):
            values[key] = [common | table if isinstance(table, dict) else table for table in tables]
    benchmark = parse(Benchmark, values, source=str(path))
    for key in ("hub", "is_probe"):
        if any(getattr(task, key) for task in (*benchmark.tasks, *benchmark.probes)):
            cure = "; give the name of a dataset as path" if key == "hub" else ""
            raise ValueError(f"{path}: tasks have no key {key!r}{cure}")
    root = data or path.parent
    tasks, probes = (
        tuple(replace(task, path=root / task.path, hub=str(task.path), is_probe=is_probe) for task in specs)
        for specs, is_probe in ((benchmark.tasks, False), (benchmark.probes, True))
    )
    return replace(benchmark, tasks=tasks, probes=probes)


Names = tuple[str, ...]


def stream_of(
    benchmark: str,
    *,
    data: Path | None = None,
    order: int = 0,
    first_tasks: int | None = None,
    more: Names = (),
    without: Names = (),
) -> tuple[TaskSpec, ...]:
    """Return the tasks of a stream: those of a benchmark, given by name or path, then those of more benchmarks.

    The data of the first one are in `data`, if that is given; one that comes without them needs it (ValueError).

    Order 0 is the benchmark's own, then come its further ones, then random ones, each another than the random ones
    before; of it come the first tasks. A task of the same name and data comes once, one that is named in `without` not
    at all.
    """
    found = read_benchmark(benchmark, data)
    specs = found.tasks
    if found.source and data is None:
        raise ValueError(
            f"benchmark {benchmark!r} comes without its data; give their folder with --data: {found.source}"
        )
    if order >= (num_orders := math.factorial(len(specs)) + len(found.orders)):
        raise ValueError(f"order = {order}: {len(specs)} tasks have only the orders 0 to {num_orders - 1}")
    stream = {specs[i].name: specs[i] for i in _ordered(found, order)[:first_tasks]}
    for another in more:
        for spec in read_benchmark(another).tasks:
            if resolved(stream.setdefault(spec.name, spec)) != resolved(spec):
                flaw = f"has another task {spec.name!r} than the stream before it"
                raise ValueError(f"benchmark {another!r} {flaw}; rename one")
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


def _ordered(benchmark: Benchmark, order: int) -> tuple[int, ...]:
    """Return the places of a benchmark's tasks in one of its orders."""
    names = [task.name for task in benchmark.tasks]
    if 0 < order <= len(benchmark.orders):
        return tuple(names.index(name) for name in benchmark.orders[order - 1])
    return _permutation(max(0, order - len(benchmark.orders)), len(names))


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
