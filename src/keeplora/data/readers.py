"""Named readers: from a folder, an archive or a Hugging Face dataset to labelled images; all that is wrong is named."""

import io
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import datasets as hf
import torch
from PIL import Image

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import Examples
from keeplora.errors import counted, listed
from keeplora.registry import Registry

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

HELD_OUT = 0.2  # Share of the training images that becomes the validation split of a task that has none.

HOLD_OUT_SEED = 42


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
    try:
        stored = READERS.find(spec.reader)(spec)
    except ValueError as error:
        raise ValueError(f"task {spec.name!r}: {error}") from None
    splits = {name: stored[name] for name in ("train", evaluation) if name in stored}
    if evaluation == "validation" and list(splits) == ["train"]:
        splits["train"], splits["validation"] = _hold_out(stored["train"])
    problems = list(_problems(spec, evaluation, stored, splits))
    return splits if problems else _named_for_prompts(spec, splits), problems


def _problems(
    spec: TaskSpec, evaluation: str, stored: dict[str, Examples], splits: dict[str, Examples]
) -> Iterator[tuple[str, str]]:
    # A validation split that there is not is drawn from train.
    missing = [split for split in ("train", evaluation) if split not in splits and split != "validation"]
    for split in missing:
        yield f"{spec.path} has no {split} split; it has {', '.join(stored)}", "add the split"
    if "train" in missing:
        return
    train = splits["train"].class_names
    stored_names: dict[str, list[str]] = {}
    for name in train:
        stored_names.setdefault(spec.class_names.get(name, name), []).append(name)
    for name, classes in stored_names.items():
        if len(classes) > 1:
            yield f"{len(classes)} classes are named {name!r}: {listed(classes)}", "their prompts must differ"
    if unknown := sorted(set(spec.class_names) - set(train)):
        yield f"class_names has {listed(unknown)}, which {spec.path} does not have", f"its classes are {listed(train)}"
    for split in [name for name in splits if name in stored]:
        examples = splits[split]
        if only := sorted(set(examples.class_names) - set(train)):
            message = f"{split} has classes that train does not have: {listed(only)}"
            yield message, f"add images to train, which has {listed(train)}"
        present = {examples.class_names[label] for label in examples.labels}
        if empty := [name for name in train if name not in present]:
            images = counted(len(empty), "class has no image", "classes have no image")
            yield f"{images} in {split}: {listed(empty)}", "add some, or remove the class"


def _named_for_prompts(spec: TaskSpec, splits: dict[str, Examples]) -> dict[str, Examples]:
    """Number the classes of all splits as the training split does, and give them their names in the prompt."""
    train = splits["train"].class_names
    names = tuple(spec.class_names.get(name, name) for name in train)
    named = {}
    for split, examples in splits.items():
        numbers = [train.index(name) for name in examples.class_names]
        named[split] = replace(examples, class_names=names, labels=tuple(numbers[label] for label in examples.labels))
    return named


def _read_folder(spec: TaskSpec) -> dict[str, Examples]:
    """Read `SPLIT/CLASS/IMAGE` from a folder, through symbolic links too, or from a zip archive."""
    if spec.path.is_dir():
        inside = os.walk(spec.path, followlinks=True)
        paths = [Path(folder) / name for folder, folders, files in inside for name in [*folders, *files]]
        names = [path.relative_to(spec.path).as_posix() + "/" * path.is_dir() for path in paths]
    elif zipfile.is_zipfile(spec.path):
        try:
            names = _archive(spec.path, os.getpid()).namelist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"{spec.path} is a damaged zip archive: {error}") from None
    else:
        raise ValueError(f"{spec.path} is neither a folder nor a zip archive; expected SPLIT/CLASS/IMAGE in it")
    images: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, set[str]] = defaultdict(set)
    for name in sorted(names):
        path = PurePosixPath(name)
        if any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and len(path.parts) >= 3
        if is_image:
            images[path.parts[0]].append(name)
        if is_image or (name.endswith("/") and len(path.parts) == 2):
            classes[path.parts[0]].add(path.parts[1])
    if not classes:
        raise ValueError(f"{spec.path} holds no image at SPLIT/CLASS/IMAGE")
    return {split: _folder_split(spec, images[split], sorted(labels)) for split, labels in classes.items()}


def _folder_split(spec: TaskSpec, names: list[str], class_names: list[str]) -> Examples:
    def load(i: int) -> Image.Image:
        if spec.path.is_dir():
            return Image.open(spec.path / names[i])
        return Image.open(io.BytesIO(_archive(spec.path, os.getpid()).read(names[i])))

    number = {label: i for i, label in enumerate(class_names)}
    labels = tuple(number[PurePosixPath(name).parts[1]] for name in names)
    return Examples(tuple(class_names), labels, load, lambda i: f"task {spec.name!r}: {spec.path / names[i]}")


@lru_cache(maxsize=64)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once for each process: a file offset cannot be shared with a worker."""
    return zipfile.ZipFile(path)


def _read_dataset(spec: TaskSpec) -> dict[str, Examples]:
    """Read a Hugging Face `DatasetDict` saved to disk, or one of the hub by name."""
    try:
        loaded = hf.load_from_disk(str(spec.path)) if spec.path.is_dir() else hf.load_dataset(spec.hub)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{spec.path} is no dataset on disk, nor can the hub be asked: {error}") from None
    if not isinstance(loaded, hf.DatasetDict):
        raise ValueError(f"{spec.path} is one split; save a DatasetDict with train and test")
    return {split: _dataset_split(spec, split, rows) for split, rows in loaded.items()}


def _dataset_split(spec: TaskSpec, split: str, rows: Any) -> Examples:
    for column in (spec.image_column, spec.label_column):
        if column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise ValueError(f"{split} has no column {column!r}; it has {there}. Set image_column and label_column")
    feature, labels = rows.features[spec.label_column], rows[spec.label_column]
    if isinstance(feature, hf.ClassLabel):
        class_names = tuple(feature.names)
    else:
        class_names = tuple(sorted({str(label) for label in labels if label is not None}))
        labels = [None if label is None else class_names.index(str(label)) for label in labels]
    for i, label in enumerate(labels):
        if label is None or not 0 <= label < len(class_names):
            raise ValueError(f"{split} row {i} has label {label}, out of range for {len(class_names)} classes")
    images = rows.cast_column(spec.image_column, hf.Image(decode=False))

    def load(i: int) -> Image.Image:
        stored = images[i][spec.image_column]
        return Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))

    return Examples(class_names, tuple(labels), load, lambda i: f"task {spec.name!r}: {split} row {i} of {spec.path}")


Reader = Callable[[TaskSpec], dict[str, Examples]]

READERS: Registry[Reader] = Registry("reader", {"folder": _read_folder, "dataset": _read_dataset})


def _hold_out(train: Examples) -> tuple[Examples, Examples]:
    """Split every class, so that none loses all its images to one side."""
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    held: set[int] = set()
    for label in range(len(train.class_names)):
        members = [i for i, other in enumerate(train.labels) if other == label]
        order = torch.randperm(len(members), generator=generator)
        held |= {members[i] for i in order[: max(1, round(HELD_OUT * len(members)))]}
    kept = [i for i in range(len(train)) if i not in held]
    return train.subset(kept), train.subset(sorted(held))
