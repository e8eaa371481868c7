"""Fingerprints of images: equal for the same pixels, near for the same picture encoded, resized or recompressed.

Alike are two whose perceptual hashes differ in at most `BITS` of 64 bits AND whose colour thumbnails in at most `COLOR`
of 255 on average: the hash takes silhouettes for one, the thumbnail small drawings. Measured in docs/doctor.md.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS, COLOR = 8, 8.0
"""Most bits of 64, and of 255 the largest mean difference of the thumbnails, that images of one picture differ by."""

FLAT = 4.0
"""Below this standard deviation of the grey values, of 255, an image has no shape: its perceptual hash is noise."""

UNSURE = 2.0
"""Frequencies that are this near to the median, in grey values, count as neither above nor below: stripes and other
regular pictures have many, and saving the image again would turn them over."""

SIDE, KEPT, THUMBNAIL = 32, 8, 8
"""Side of the grey image that is hashed, of the block of its low frequencies that is kept, and of the thumbnail."""

PRINT = [("digest", "S16"), ("signs", np.int8, KEPT**2), ("colors", np.uint8, 3 * THUMBNAIL**2)]
"""A fingerprint: a hash of the pixels, equal for equal images of one size; the perceptual hash, 1, -1, or 0 where it is
unsure (all 0 for an image without a shape); and the colour thumbnail."""

MOST_PAIRS = 2**16

Prints = NDArray[np.void]  # One fingerprint, or those of n images.
Ints = NDArray[np.int64]


def fingerprint(image: Image.Image) -> Prints:
    """Return the fingerprint of an RGB image."""
    content = repr(image.size).encode() + image.tobytes()
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    colors = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).reshape(-1)
    return np.array((hashlib.blake2b(content, digest_size=16).digest(), _signs(grey), colors), PRINT)


def equal_images(images: Prints, others: Prints) -> Ints:
    """Return for each image the first of the others with the very same pixels, or -1: `[n]`."""
    first = {digest: place for place, digest in reversed(list(enumerate(others["digest"].tolist())))}
    return np.array([first.get(digest, -1) for digest in images["digest"].tolist()], np.int64)


def alike_images(images: Prints, others: Prints, *, chunk: int = 4096) -> Ints:
    """Return for each image the one of the others that is most alike, or -1 if none is alike enough: `[n]`.

    All pairs are compared: hashes of 1 and -1 differ in `(64 - their product) / 2` bits, so that a product of matrices
    counts the bits of a chunk of pairs, and memory stays at a few times `chunk` squared.
    """
    least = 1 - 2 * BITS / KEPT**2 - 1e-5  # Less what may be rounded.
    nearest = np.full(len(images), np.nextafter(COLOR, np.inf))  # So that a difference of `COLOR` is less.
    found = np.full(len(images), -1, np.int64)
    for start in range(0, len(images), chunk):
        signs = _unit(images["signs"][start : start + chunk])
        for offset in range(0, len(others), chunk):
            agreement = signs @ _unit(others["signs"][offset : offset + chunk]).T
            agreeing = np.flatnonzero(agreement.reshape(-1) >= least)
            for part in np.split(agreeing, range(MOST_PAIRS, len(agreeing), MOST_PAIRS)):
                rows, columns = np.divmod(part, agreement.shape[1])
                _keep_nearest(images, others, (rows + start, columns + offset), nearest, found)
    return found


def _keep_nearest(images: Prints, others: Prints, pairs: tuple[Ints, Ints], nearest: NDArray[Any], found: Ints) -> None:
    """Put the nearest candidate of each image by the thumbnails into `found`, if it is nearer than what was found."""
    rows, columns = pairs
    one, other = images["colors"][rows], others["colors"][columns]
    differences = (np.maximum(one, other) - np.minimum(one, other)).mean(1, dtype=np.float32)
    order = np.argsort(differences, kind="stable")
    best = order[np.unique(rows[order], return_index=True)[1]]
    best = best[differences[best] < nearest[rows[best]]]
    nearest[rows[best]], found[rows[best]] = differences[best], columns[best]


def _unit(signs: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return hashes `[n, 64]` with norm 1; those of images without a shape stay 0 and agree with nothing."""
    rows = signs.astype(np.float32)
    unit: NDArray[np.float32] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1)
    return unit


def _signs(grey: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return for each low frequency of a grey image whether it is above their median."""
    if grey.std() < FLAT:
        return np.zeros(KEPT**2, np.int8)
    places = np.pi * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
    transform = np.cos(np.arange(KEPT)[:, None] * places).astype(np.float32)  # The first rows of a cosine transform.
    frequencies = (transform @ grey @ transform.T).reshape(-1) / (SIDE / 2)
    above = frequencies - np.median(frequencies[1:])
    return (np.sign(above) * (np.abs(above) > UNSURE)).astype(np.int8)
