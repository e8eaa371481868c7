"""One split of labelled images, decoded on demand; an image that cannot be read is named."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What Pillow and zipfile raise for a damaged, encrypted or missing image."""

PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # Colours that are multiplied by their opacity already.


@dataclass(frozen=True)
class Examples:
    """Labelled images of one split: `labels[i]` indexes `class_names`, `load(i)` decodes image i."""

    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    load: Callable[[int], Image.Image]
    origin: Callable[[int], str]  # Says where image i comes from, for messages.
    left_out: tuple[str, ...] = ()  # What lies beside the images and is not read, each with the reason.
    max_megapixels: int = 80

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` as RGB: turned as its EXIF data say, transparent parts on white, greys as 8 bits."""
        return decoded(lambda: self.load(index), self.origin(index), self.max_megapixels)

    def subset(self, indices: list[int]) -> "Examples":
        """Return some of the examples."""
        labels = tuple(self.labels[i] for i in indices)
        load, origin = (lambda i: self.load(indices[i])), (lambda i: self.origin(indices[i]))
        return replace(self, labels=labels, load=load, origin=origin)


def decoded(load: Callable[[], Image.Image], origin: str, max_megapixels: int) -> Image.Image:
    """Decode an image as RGB, as `Examples.image` does; ValueError names where it comes from."""
    try:
        with load() as image:
            if (size := image.width * image.height) > max_megapixels * 10**6:
                limit = f"more than the task's max_megapixels = {max_megapixels}"
                raise ValueError(f"it has {size / 1e6:,.0f} megapixels, {limit}")
            return _as_rgb(image)
    except (*UNREADABLE_IMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"{origin} is not a readable image ({error}); replace or remove it") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(as_bytes(np.asarray(image)))
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_bytes(greys: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale whole grey values to 8 bits: their range is that of the fewest of 8, 10, 12, 14 or 16 bits which holds all.

    Pictures of 10 to 14 bits are stored with 16, and ones of 8 bits with 32, without a word of it in the file.
    """
    least, largest = int(greys.min(initial=0)), int(greys.max(initial=0))
    bits = next((bits for bits in (8, 10, 12, 14, 16) if least >= 0 and largest < 2**bits), None)
    if bits is None:
        raise ValueError(f"grey values from {least} to {largest} have no known range; save it with 8 or 16 bits")
    scaled: NDArray[np.uint8] = (greys * (255 / (2**bits - 1))).astype(np.uint8)
    return scaled
