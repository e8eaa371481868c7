"""One look at every image of a split: can it be read, how large is it, what is lost, what is its fingerprint."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from keeplora.data.images import UNREADABLE_IMAGE, Examples
from keeplora.progress import Track
from keeplora.studies.doctor.image_fingerprints import Prints, fingerprint

TRANSPARENT = "an alpha channel, put on white"

ANIMATIONS = frozenset({"GIF", "WEBP", "PNG", "TIFF"})
"""Formats whose further frames are pictures of their own."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one image showed, by its place in the split; an error if it cannot be read."""

    index: int
    size: tuple[int, int] = (0, 0)
    losses: tuple[str, ...] = ()
    """What of it does not reach the model."""
    error: str = ""
    print: Prints | None = None
    """Its fingerprint; None if it was not decoded."""


def look_at(examples: Examples, track: Track, description: str, *, decode: bool) -> list[Look]:
    """Look at every image of a split, several at the same time; without `decode` only the headers are read."""
    # Pillow lets other threads run while it decodes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = pool.map(lambda index: _look(examples, index, decode), range(len(examples)))
        return list(track(looks, description, len(examples)))


def _look(examples: Examples, index: int, decode: bool) -> Look:
    try:
        with examples.load(index) as image:
            size, losses = image.size, _losses(image)
            if not decode:
                image.verify()
        return Look(index, size, losses, print=fingerprint(examples.image(index)) if decode else None)
    except (*UNREADABLE_IMAGE, Image.DecompressionBombError) as error:
        message, origin = str(error), examples.origin(index)
        return Look(index, error=message if origin in message else f"{origin} ({message})")


def _losses(image: Image.Image) -> tuple[str, ...]:
    losses = {
        "16-bit pixels, cut to 8 bits": image.mode.startswith("I"),
        TRANSPARENT: image.has_transparency_data,
        "CMYK colours, turned to RGB without their profile": image.mode == "CMYK",
        "several frames, of which only the first is used": (
            image.format in ANIMATIONS and getattr(image, "is_animated", False)
        ),
    }
    return tuple(loss for loss, is_lost in losses.items() if is_lost)
