"""Named readers: from a folder, an archive or a Hugging Face dataset to labelled images; all that is wrong is named."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unicodedata import normalize

import datasets as hf
import torch
from datasets.exceptions import DatasetsError
from PIL import Image

from keeplora.data.benchmark import TaskSpec
from keeplora.data.conversations import (
    HOLD_OUT_SEED,
    Conversations,
    hold_out,
    read_llava,
    read_messages,
    read_question_answer,
)
from keeplora.data.folder import read_folder
from keeplora.data.images import Examples
from keeplora.errors import counted, listed
from keeplora.registry import Registry

HELD_OUT = 0.2  # Share of the training images that becomes the validation split of a task that has none.

TEXT = ("string", "large_string", "bool")
STORED = {"bytes": hf.Value("binary"), "path": hf.Value("string")}


def read_splits(spec: TaskSpec, evaluation: str) -> tuple[Examples, Examples]:
    """Read the training split of a task and the one to evaluate on (`test` or `validation`).

    A missing validation split is drawn from the training images with a fixed seed, and the task trains on the rest. A
    `ValueError` names the task, the place, and the first of all that is missing, empty, or inconsistent.
    """
    splits, problems = examine_splits(spec, evaluation)
    if problems:
        raise ValueError(f"task {spec.name!r}: {'; '.join(problems[0])}")
    return splits["train"], splits[evaluation]


def examine_splits(spec: TaskSpec, evaluation: str) -> tuple[dict[str, Examples], list[tuple[str, str]]]:
    """Read the splits that `read_splits` reads, and find all that makes it refuse them, each with its cure.

    Where there is a problem, classes have the names and numbers that are stored.
    """
    stored = {split: read for split, read in stored_splits(spec).items() if isinstance(read, Examples)}
    if not stored:
        flaw = "gives conversations, which need a generative model"
        raise ValueError(f"task {spec.name!r}: reader {spec.reader!r} {flaw}; give another model or reader")
    available = _with_test_share(spec, stored)
    if spec.is_probe and evaluation in available:
        available = {"train": available[evaluation], **available}
    splits = {name: available[name] for name in ("train", evaluation) if name in available}
    if evaluation == "validation" and list(splits) == ["train"]:
        splits["train"], splits["validation"] = _hold_out(splits["train"], HELD_OUT)
    problems = list(_problems(spec, evaluation, stored, splits))
    return splits if problems else _named_for_prompts(spec, splits), problems


def read_conversations(spec: TaskSpec, evaluation: str) -> tuple[Conversations, Conversations]:
    """Read the training split of a task of conversations, and the one to evaluate on, as `read_splits` does."""
    stored = {split: read for split, read in stored_splits(spec).items() if isinstance(read, Conversations)}
    if not stored:
        cure = "set reader to llava, messages or question_answer"
        raise ValueError(f"task {spec.name!r}: reader {spec.reader!r} gives no conversations; {cure}")
    if spec.is_probe and evaluation in stored:
        stored.setdefault("train", stored[evaluation])
    if evaluation == "validation" and "validation" not in stored and "train" in stored:
        stored["train"], stored["validation"] = hold_out(stored["train"], HELD_OUT, seed=HOLD_OUT_SEED)
    for split in ("train", evaluation):
        if split not in stored:
            raise ValueError(f"task {spec.name!r}: {spec.path} has no {split} split; it has {', '.join(stored)}")
    return stored["train"], stored[evaluation]


def stored_splits(spec: TaskSpec) -> Mapping[str, Examples | Conversations]:
    """Read all splits that a task has in its place."""
    try:
        return READERS.find(spec.reader)(spec)
    except ValueError as error:
        raise ValueError(f"task {spec.name!r}: {error}") from None


def _with_test_share(spec: TaskSpec, stored: dict[str, Examples]) -> dict[str, Examples]:
    """Return the splits with a test split drawn from train, if the task asks for one and has none."""
    if not spec.test_share or "test" in stored or "train" not in stored:
        return stored
    train, test = _hold_out(stored["train"], spec.test_share)
    return {**stored, "train": train, "test": test}


def _classes_with_images(examples: Examples) -> set[str]:
    return {examples.class_names[label] for label in examples.labels}


def _problems(
    spec: TaskSpec, evaluation: str, stored: dict[str, Examples], splits: dict[str, Examples]
) -> Iterator[tuple[str, str]]:
    # A split that is evaluated on and not stored is drawn from train.
    is_drawn = evaluation in splits and evaluation not in stored
    missing = [split for split in ("train", evaluation) if split not in splits and split != "validation"]
    for split in missing:
        cure = "add the split" + (", or to the task: test_share = 0.2" if split == "test" and "train" in stored else "")
        yield f"{spec.path} has no {split} split; it has {', '.join(stored)}", cure
    if "train" in missing:
        return
    train = splits["train"].class_names
    if odd := [ascii(name) for name in train if not name.isprintable() or not name.strip()]:
        yield f"{counted(len(odd), 'class name')} cannot be shown: {listed(odd)}", "rename each"
    stored_names: dict[str, list[str]] = {}
    for name in train:
        stored_names.setdefault(spec.class_names.get(name, name.replace("_", " ")), []).append(name)
    for name, classes in stored_names.items():
        if len(classes) > 1:
            yield f"{len(classes)} classes are named {name!r}: {listed(classes)}", "their prompts must differ"
    if unknown := sorted(set(spec.class_names) - set(train)):
        yield f"class_names has {listed(unknown)}, which {spec.path} does not have", f"its classes are {listed(train)}"
    for split, examples in splits.items():
        if only := sorted(set(examples.class_names) - set(train)):
            message = f"{split} has classes that train does not have: {listed(only)}"
            yield message, f"add images to train, which has {listed(train)}"
        present = _classes_with_images(examples)
        if empty := [name for name in train if name not in present]:
            images = counted(len(empty), "class has no image", "classes have no image")
            message, cure = f"{images} in {split}: {listed(empty)}", "add some, or remove the class"
            taken = _classes_with_images(splits[evaluation]) if split == "train" and is_drawn else set()
            if taken.issuperset(empty):
                message = f"{counted(len(empty), 'class has', 'classes have')} one image, which {evaluation} takes"
                message, cure = f"{message}: {listed(empty)}", f"add images, or a {evaluation} split"
            elif examples.left_out:
                message += f"; left out: {listed(examples.left_out, 3)}"
            yield message, cure


def _named_for_prompts(spec: TaskSpec, splits: dict[str, Examples]) -> dict[str, Examples]:
    """Number the classes of all splits as the training split does, and give them their names in the prompt."""
    train = splits["train"].class_names
    names = tuple(spec.class_names.get(name, name.replace("_", " ")) for name in train)
    named = {}
    for split, examples in splits.items():
        numbers = [train.index(name) for name in examples.class_names]
        named[split] = replace(examples, class_names=names, labels=tuple(numbers[label] for label in examples.labels))
    return named


def _read_dataset(spec: TaskSpec) -> dict[str, Examples]:
    """Read a Hugging Face `DatasetDict` saved to disk, or one of the hub by name."""
    try:
        if any((spec.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = hf.load_from_disk(str(spec.path))
        else:
            source = str(spec.path) if spec.path.is_dir() else spec.hub
            loaded = hf.load_dataset(source, spec.config or None)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, DatasetsError) as error:
        # Whatever a builder raises for the files that it is given: all of it is about these.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{spec.path} is no dataset on disk, nor can the hub be asked: {reason}") from None
    if not isinstance(loaded, hf.DatasetDict):
        if not spec.test_share:
            cure = "save a DatasetDict with train and test, or add to the task: test_share = 0.2"
            raise ValueError(f"{spec.path} is one split; {cure}")
        loaded = {"train": loaded}
    read = {split: _dataset_split(spec, split, rows) for split, rows in loaded.items()}
    # A filter leaves the names of the classes that it takes out.
    used = {examples.class_names[label] for examples in read.values() for label in examples.labels}
    return {split: _only(examples, used) for split, examples in read.items()}


def _only(examples: Examples, used: set[str]) -> Examples:
    names = tuple(name for name in examples.class_names if name in used)
    labels = tuple(names.index(examples.class_names[label]) for label in examples.labels)
    return replace(examples, class_names=names, labels=labels)


def _dataset_split(spec: TaskSpec, split: str, rows: Any) -> Examples:
    for column in (spec.image_column, spec.label_column):
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise ValueError(f"{split} has no column {column!r}; it has {there}. Set image_column and label_column")
    class_names, labels = _labels_of(rows.features[spec.label_column], rows[spec.label_column], split, spec)
    kind = rows.features[spec.image_column]
    if not (isinstance(kind, hf.Image) or kind in (hf.Value("string"), hf.Value("binary"), STORED)):
        raise ValueError(f"{split}: column {spec.image_column!r} is {kind}, no image; set image_column to another one")
    images = rows.cast_column(spec.image_column, hf.Image(decode=False))

    def load(i: int) -> Image.Image:
        stored = images[i][spec.image_column]
        if stored is None:
            raise ValueError("there is none in this row")
        if stored["bytes"] is None:
            return Image.open(stored["path"])
        spec.require_size(len(stored["bytes"]))
        return Image.open(io.BytesIO(stored["bytes"]))

    def origin(i: int) -> str:
        return f"task {spec.name!r}: {split} row {i} of {spec.path}"

    return Examples(class_names, labels, load, origin, max_megapixels=spec.max_megapixels)


def _labels_of(kind: Any, labels: Any, split: str, spec: TaskSpec) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of the classes, whole numbers in their order, and the number of each row's."""
    labels = list(labels)
    if isinstance(kind, hf.ClassLabel):
        names = tuple(normalize("NFC", name) for name in kind.names)
    elif isinstance(kind, hf.Value) and (kind.dtype in TEXT or kind.dtype.startswith(("int", "uint"))):
        names = tuple(str(label) for label in sorted({label for label in labels if label is not None}))
        if kind.dtype in TEXT:
            labels = [None if label is None else normalize("NFC", str(label)) for label in labels]
            names = tuple(sorted({label for label in labels if label is not None}))
        labels = [None if label is None else names.index(str(label)) for label in labels]
    else:
        cure = "set label_column to one of names or whole numbers, or make it a ClassLabel"
        raise ValueError(f"{split}: column {spec.label_column!r} is {kind}, no label of a class; {cure}")
    for i, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"{split} row {i} has label {label}, out of range for {len(names)} classes")
    return names, tuple(labels)


Reader = Callable[[TaskSpec], Mapping[str, Examples | Conversations]]

READERS: Registry[Reader] = Registry(
    "reader",
    {
        "folder": read_folder,
        "dataset": _read_dataset,
        "llava": read_llava,
        "messages": read_messages,
        "question_answer": read_question_answer,
    },
)


def _hold_out(train: Examples, share: float) -> tuple[Examples, Examples]:
    """Split every class, with a fixed seed; one with two images or more keeps some on either side."""
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    held: set[int] = set()
    for label in range(len(train.class_names)):
        members = [i for i, other in enumerate(train.labels) if other == label]
        order = torch.randperm(len(members), generator=generator)
        most = len(members) - 1 if len(members) > 1 else len(members)
        held |= {members[i] for i in order[: min(most, max(1, round(share * len(members))))]}
    kept = [i for i in range(len(train)) if i not in held]
    return train.subset(kept), train.subset(sorted(held))
