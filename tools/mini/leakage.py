"""Find pre-training drawings that are near-duplicates of a task's validation or test drawings."""

from collections import Counter

import numpy as np
from PIL import Image
from scipy.fft import dctn

from .emoji_tasks import Splits

HASH_BITS = 8
THUMBNAIL = 16
MAX_BITS = 10
MAX_DIFFERENCE = 22.0
MAX_BITS_ALONE = 3


def on_white(image: np.ndarray) -> np.ndarray:
    """Return an RGBA drawing, or a light-on-dark grey picture, as `[h, w, 3]` float on white."""
    if image.ndim == 2:
        return np.repeat(255.0 - image[..., None].astype(np.float32), 3, 2)
    alpha = image[..., 3:].astype(np.float32) / 255
    return image[..., :3] * alpha + 255 * (1 - alpha)


def signature(image: np.ndarray) -> tuple[np.uint64, np.ndarray]:
    """Return a 64-bit perceptual hash (signs of the low cosine frequencies) and a small RGB thumbnail."""
    picture = Image.fromarray(on_white(image).astype(np.uint8))
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
    low = dctn(grey, norm="ortho")[:HASH_BITS, :HASH_BITS].reshape(-1)
    bits = np.packbits(low > np.median(low[1:])).view(np.uint64)[0]
    return bits, np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.uint8)


def signatures(images: np.ndarray | list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes `[n]` and thumbnails `[n, 16, 16, 3]` of drawings."""
    pairs = [signature(image) for image in images]
    return np.array([bits for bits, _ in pairs], np.uint64), np.stack([thumbnail for _, thumbnail in pairs])


def near_duplicates(
    known: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray], *, chunk: int = 256
) -> np.ndarray:
    """Return `[n] bool`: which known drawings look like any held-out one.

    Alike means hashes within 3 of 64 bits, or within 10 bits with thumbnails that differ by less than 22 of 255.
    """
    alike = np.zeros(len(known[0]), bool)
    for start in range(0, len(held_out[0]), chunk):
        distance = np.bitwise_count(known[0][:, None] ^ held_out[0][None, start : start + chunk])
        alike |= (distance <= MAX_BITS_ALONE).any(1)
        for row, column in np.argwhere((distance <= MAX_BITS) & ~alike[:, None]):
            difference = np.abs(known[1][row].astype(np.int16) - held_out[1][start + column]).mean()
            alike[row] |= difference < MAX_DIFFERENCE
    return alike


def held_out_images(splits: Splits) -> list[np.ndarray]:
    """Return every validation and test drawing of a task."""
    return [image for split in ("validation", "test") for drawn in splits[split].values() for _, image in drawn]


def report(matches: dict[str, np.ndarray], sources: list[str]) -> dict[str, dict[str, int]]:
    """Return task -> source -> number of pre-training drawings removed because of it."""
    return {task: dict(Counter(np.asarray(sources)[alike])) for task, alike in matches.items()}
