"""One look at every image of a split: can it be read, how large is it, what is lost, what are its fingerprints."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image, UnidentifiedImageError

from keeplora.data.images import UNREADABLE_IMAGE, Examples
from keeplora.progress import Track
from keeplora.studies.doctor.image_fingerprints import Print, Prints, fingerprint, stack

LOSSY = {
    "16 bits": "16-bit pixels, cut to 8 bits",
    "transparent": "an alpha channel, put on white",
    "CMYK": "CMYK colours, turned to RGB without their profile",
    "animated": "several frames, of which only the first is used",
}
"""What of an image does not reach the model, by a short name."""

ANIMATIONS = frozenset({"GIF", "WEBP", "PNG", "TIFF"})
"""Formats whose further frames are pictures of their own."""


@dataclass(frozen=True)
class Look:
    """What one image showed."""

    size: tuple[int, int] = (0, 0)
    losses: tuple[str, ...] = ()
    error: str = ""
    print: Print | None = None


@dataclass
class Scan:
    """What the images of a split showed; `indices[i]` is the place in the split of the i-th one that could be read."""

    indices: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    losses: dict[str, list[int]] = field(default_factory=dict)
    """The places of the images that lose something, by a key of `LOSSY`."""
    errors: list[str] = field(default_factory=list)
    """A message for each image that cannot be read."""
    prints: Prints = field(default_factory=lambda: stack([]))
    """Fingerprints of the readable images; empty without `decode`."""


def scan(examples: Examples, track: Track, description: str, *, decode: bool = True) -> Scan:
    """Look at every image of a split, several at the same time.

    Args:
        examples: The split.
        track: Shows progress over the images.
        description: What is shown.
        decode: Decode the pixels and take fingerprints; without it only the headers are read.
    """
    found, prints = Scan(), []
    for index, one in enumerate(track(_looks(examples, decode), description, len(examples))):
        if one.error:
            found.errors.append(one.error)
            continue
        found.indices.append(index)
        found.sizes.append(one.size)
        for loss in one.losses:
            found.losses.setdefault(loss, []).append(index)
        if one.print is not None:
            prints.append(one.print)
    found.prints = stack(prints)
    return found


def _looks(examples: Examples, decode: bool) -> Iterator[Look]:
    # Pillow lets other threads run while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda index: _look(examples, index, decode), range(len(examples)))


def _look(examples: Examples, index: int, decode: bool) -> Look:
    try:
        with examples.load(index) as image:
            size, losses = image.size, tuple(_losses(image))
            if not decode:
                image.verify()
        return Look(size, losses, print=fingerprint(examples.image(index)) if decode else None)
    except (*UNREADABLE_IMAGE, UnidentifiedImageError, Image.DecompressionBombError) as error:
        message = str(error)
        return Look(error=message if examples.origin(index) in message else f"{examples.origin(index)} ({error})")


def _losses(image: Image.Image) -> Iterator[str]:
    if image.mode.startswith("I"):
        yield "16 bits"
    if image.has_transparency_data:
        yield "transparent"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.format in ANIMATIONS and getattr(image, "is_animated", False):
        yield "animated"
