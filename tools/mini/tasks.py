"""Write the task archives: `train|validation|test/<class>/<number>.webp`, deterministic zip files."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from . import classes, composite, task_drawings
from .emoji_tasks import Splits
from .task_drawings import PER_CLASS, SPLITS

INK = {"letters", "scripts"}
INVERTED = {"silhouettes"}


def write_archive(task: str, splits: Splits, path: Path) -> int:
    """Write one task's archive and return the number of images."""
    entries: dict[str, bytes] = {}
    for split, count in zip(SPLITS, PER_CLASS[task], strict=True):
        for label in sorted(splits[split]):
            for number, image in enumerate(images_of(task, split, label, splits[split][label], count)):
                entries[f"{split}/{label}/{number:03d}.webp"] = webp(image)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), entries[name])
    return len(entries)


def images_of(task: str, split: str, label: str, drawn: list[tuple[str, np.ndarray]], count: int) -> list[np.ndarray]:
    """Return `count` images of a class: composites of its drawings in turn, or its pictures enlarged."""
    seed = int.from_bytes(hashlib.sha256(f"{task}/{split}/{label}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(drawn))
    chosen = [drawn[order[number % len(drawn)]][1] for number in range(count)]
    if chosen[0].ndim == 2:
        return [composite.enlarge(255 - image if task in INVERTED else image) for image in chosen[: len(drawn)]]
    return [composite.compose(image, rng, ink=task in INK) for image in chosen]


def webp(image: np.ndarray) -> bytes:
    """Return an RGB image as lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=90, method=4)
    return buffer.getvalue()


def build(unpacked: Path, folder: Path) -> dict[str, int]:
    """Write the archives of all tasks and return the images in each."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        task: write_archive(task, task_drawings.splits_of(task, unpacked), folder / f"{task}.zip")
        for task in classes.TEMPLATES
    }
