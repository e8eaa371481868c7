"""Named readers: from a folder, an archive or a Hugging Face dataset to labelled images.

Everything that can be wrong with a user's data is found here, before training starts, and named.
"""

import io
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import datasets as hf
import torch
from PIL import Image

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import Examples
from keeplora.registry import Registry

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

HELD_OUT = 0.2
"""Share of the training images that becomes the validation split of a task that has none."""

HOLD_OUT_SEED = 42


def read_splits(spec: TaskSpec, evaluation: str) -> tuple[Examples, Examples]:
    """Read the training split of a task and the one to evaluate on (`test` or `validation`).

    A missing validation split is drawn from the training images with a fixed seed, and the task trains on the rest.

    Raises:
        ValueError: If data is missing, empty, or inconsistent; the message names the task and the place.
    """
    try:
        splits = READERS.find(spec.reader)(spec)
    except ValueError as error:
        raise ValueError(f"task {spec.name!r}: {error}") from None
    if "train" not in splits:
        raise ValueError(f"task {spec.name!r}: {spec.path} has no train split; it has {', '.join(splits)}")
    train = splits["train"]
    if evaluation == "validation" and "validation" not in splits:
        train, held_out = _hold_out(train)
    elif evaluation in splits:
        held_out = splits[evaluation]
    else:
        raise ValueError(f"task {spec.name!r}: {spec.path} has no {evaluation} split; it has {', '.join(splits)}")
    if unknown := sorted(set(spec.class_names) - set(train.class_names)):
        raise ValueError(
            f"task {spec.name!r}: class_names has {unknown[0]!r}, which is no class of {spec.path}; its classes are"
            f" {', '.join(train.class_names[:20])}"
        )
    names = tuple(spec.class_names.get(name, name) for name in train.class_names)
    _require_distinct(spec, names)
    held_out = _with_labels_of(train, held_out, spec, evaluation)
    for split, examples in (("train", train), (evaluation, held_out)):
        _require_every_class(spec, split, examples)
    return replace(train, class_names=names), replace(held_out, class_names=names)


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


def _with_labels_of(train: Examples, other: Examples, spec: TaskSpec, split: str) -> Examples:
    """Renumber a split's labels as the training split numbers its classes."""
    if unknown := sorted(set(other.class_names) - set(train.class_names)):
        raise ValueError(
            f"task {spec.name!r}: {split} has the class {unknown[0]!r}, which train does not have; train has"
            f" {', '.join(train.class_names[:20])}"
        )
    numbers = {i: train.class_names.index(name) for i, name in enumerate(other.class_names)}
    return replace(other, class_names=train.class_names, labels=tuple(numbers[label] for label in other.labels))


def _require_every_class(spec: TaskSpec, split: str, examples: Examples) -> None:
    present = set(examples.labels)
    if empty := [name for label, name in enumerate(examples.class_names) if label not in present]:
        raise ValueError(
            f"task {spec.name!r}: the class {empty[0]!r} has no image in {split}; add some, or remove the class"
        )


def _require_distinct(spec: TaskSpec, names: tuple[str, ...]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"task {spec.name!r}: {count} classes are named {name!r}; their prompts must differ")
