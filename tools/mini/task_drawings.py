"""The images of every task before compositing: drawings (RGBA) or photographs (grey), by split and class."""

import gzip
import pickletools
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from . import classes, glyphs
from .emoji_tasks import TEST, TRAIN, VALIDATION, Splits, emoji_splits, flag_splits

PER_CLASS = {
    "digits": (54, 14, 28), "fashion": (54, 14, 28), "silhouettes": (54, 14, 28), "letters": (22, 5, 10),
    "scripts": (32, 8, 14), "animals": (20, 5, 9), "food": (20, 5, 9), "objects": (20, 5, 9), "places": (26, 6, 12),
    "vehicles": (25, 6, 12), "flags": (19, 5, 9),
}  # fmt: skip
SPLITS = (TRAIN, VALIDATION, TEST)
# Words that look like a word the shipped model saw (other characters, but a hash within the limits of leakage.py).
LOOKALIKES = {
    "Lohit-Malayalam:\u0d2f\u0d13\u0d39",
    "Chilanka-Regular:\u0d31\u0d0b\u0d2f",
    "Chilanka-Regular:\u0d13\u0d0f\u0d0b",
    "Chilanka-Regular:\u0d38\u0d05",
    "Lohit-Malayalam:\u0d09\u0d1b\u0d1b",
    "Lohit-Malayalam:\u0d23\u0d05",
}


def splits_of(task: str, unpacked: Path) -> Splits:
    """Return split -> class -> [(key, image)] of a task; emoji and glyph images are RGBA, the others `[h, w]` grey."""
    if task in classes.EMOJI_TASKS:
        return emoji_splits(unpacked, task)
    if task == "flags":
        return flag_splits(unpacked)
    return {"digits": digits, "fashion": fashion, "silhouettes": silhouettes, "letters": letters, "scripts": scripts}[
        task
    ](unpacked)


def digits(_: Path) -> Splits:
    """Return scikit-learn's handwritten digits: the first writers train, later ones validate and test (UCI order)."""
    data = load_digits()
    images = np.asarray(data.images * 255 / 16, np.uint8)
    grouped = by_class(images, data.target, classes.DIGITS)
    return slices(grouped, "digits", {TRAIN: (0.0, 0.5), VALIDATION: (0.5, 0.7), TEST: (0.7, 1.0)})


def fashion(unpacked: Path) -> Splits:
    """Return Fashion-MNIST: training and validation from its training files, test from its test files."""
    root = unpacked / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    loaded = {}
    for part in ("train", "t10k"):
        images = idx(next(root.rglob(f"{part}-images-idx3-ubyte.gz"))).reshape(-1, 28, 28)
        loaded[part] = by_class(images, idx(next(root.rglob(f"{part}-labels-idx1-ubyte.gz"))), classes.FASHION)
    result = slices(loaded["train"], "fashion", {TRAIN: (0.0, 0.8), VALIDATION: (0.8, 1.0)})
    return result | slices(loaded["t10k"], "fashion", {TEST: (0.0, 1.0)})


def idx(path: Path) -> np.ndarray:
    """Return the bytes of a gzipped IDX file without its header."""
    data = gzip.decompress(path.read_bytes())
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])


def silhouettes(unpacked: Path) -> Splits:
    """Return Animal-MNIST without pictures that look alike: each cluster of near-duplicates stays in one split."""
    root = unpacked / "animal/animal_mnist/data/Animal_MNIST"
    parts = [gzip.decompress((root / f"animal_{part}_version_3.gz").read_bytes()) for part in ("data", "label")]
    images = np.frombuffer(array_bytes(parts[0]), np.uint8).reshape(-1, 28, 28)
    labels = np.frombuffer(array_bytes(parts[1]), "<i8")
    grouped = by_class(images, labels, classes.SILHOUETTES)
    unlike = {label: distinct(drawn, rows=600) for label, drawn in grouped.items()}
    return slices(unlike, "silhouettes", {TRAIN: (0.0, 0.5), VALIDATION: (0.5, 0.65), TEST: (0.65, 1.0)})


def array_bytes(data: bytes) -> bytes:
    """Return the bytes of the one array in a pickle that came with a package; it is only disassembled, never run."""
    (content,) = (argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "BINBYTES")
    return bytes(content)


def distinct(
    drawn: list[tuple[str, np.ndarray]], *, rows: int, tolerance: float = 26.0
) -> list[tuple[str, np.ndarray]]:
    """Return up to `rows` images (mirrored ones count as alike) of which no two differ by less than `tolerance`."""
    kept: list[tuple[str, np.ndarray]] = []
    small = np.zeros((0, 196), np.float32)
    for key, image in drawn:
        view = np.asarray(Image.fromarray(image).resize((14, 14), Image.Resampling.BOX), np.float32)
        flat, mirrored = view.reshape(-1), view[:, ::-1].reshape(-1)
        near = min(np.abs(small - flat).mean(1).min(initial=255), np.abs(small - mirrored).mean(1).min(initial=255))
        if near >= tolerance:
            kept.append((key, image))
            small = np.concatenate([small, flat[None]])
        if len(kept) == rows:
            break
    return kept


def by_class(images: np.ndarray, labels: np.ndarray, label_names: list[str]) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Return class -> [(row number, image)] in the order of the files."""
    return {
        name: [(str(row), images[row]) for row in np.flatnonzero(labels == number)]
        for number, name in enumerate(label_names)
    }


def slices(
    grouped: dict[str, list[tuple[str, np.ndarray]]], task: str, parts: dict[str, tuple[float, float]]
) -> Splits:
    """Return for each split an even sample of its stretch of each class."""
    result: Splits = {}
    for split, (low, high) in parts.items():
        wanted = PER_CLASS[task][SPLITS.index(split)]
        result[split] = {}
        for label, drawn in grouped.items():
            stretch = drawn[round(low * len(drawn)) : round(high * len(drawn))]
            picked = np.linspace(0, len(stretch) - 1, min(wanted, len(stretch))).astype(int)
            result[split][label] = [stretch[row] for row in picked]
    return result


def letters(unpacked: Path) -> Splits:
    """Return capital letters of the aenigma fonts; one font of each family, each family in one split."""
    files = glyphs.font_files(unpacked / "fonts", glyphs.LATIN_TASK_PACKAGE)
    families = sorted({family(path) for path in files})
    random.Random(0).shuffle(families)
    part_of = {name: (TRAIN if n % 8 < 4 else VALIDATION if n % 8 == 4 else TEST) for n, name in enumerate(families)}
    result: Splits = {split: {letter: [] for letter in classes.LETTERS} for split in SPLITS}
    random.Random(1).shuffle(files)
    seen: set[str] = set()
    for path in files:
        if family(path) in seen:
            continue
        seen.add(family(path))
        for name, key, image in glyphs.latin([path]):
            letter = name.split()[1]
            if name.startswith("letter") and key[-1].isupper():
                result[part_of[family(path)]][letter].append((key, image))
    return result


def family(path: Path) -> str:
    """Return the first five letters of a font's name: aenigma names variants by endings."""
    return path.stem.lower()[:5]


def scripts(unpacked: Path) -> Splits:
    """Return words of 18 scripts: characters kept out of pre-training, other fonts for training than for test."""
    result: Splits = {split: {} for split in SPLITS}
    for script in classes.SCRIPTS:
        held_out = {part: glyphs.characters(script, part) for part in (VALIDATION, TEST)}
        chosen = {TRAIN: held_out[VALIDATION] + held_out[TEST], **held_out}
        for split, count in zip(SPLITS, PER_CLASS["scripts"], strict=True):
            files = glyphs.script_fonts(unpacked / "fonts", script, split)
            rng = random.Random(f"{script} {split}")
            drawn = glyphs.words(script, chosen[split], files, count, rng)
            result[split][script] = [(key, image) for _, key, image in drawn if key not in LOOKALIKES]
    return result
