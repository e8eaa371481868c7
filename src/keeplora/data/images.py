"""One split of labelled images, decoded on demand; an image that cannot be read is named."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageOps

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What Pillow and zipfile raise for a damaged, encrypted or missing image."""


@dataclass(frozen=True)
class Examples:
    """Labelled images of one split: `labels[i]` indexes `class_names`, `load(i)` decodes image i."""

    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    load: Callable[[int], Image.Image]
    origin: Callable[[int], str]  # Says where image i comes from, for messages.

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` as RGB: turned as its EXIF data say, transparent parts on white, 16 bits cut to 8."""
        try:
            with self.load(index) as image:
                return _as_rgb(image)
        except (*UNREADABLE_IMAGE, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.origin(index)} is not a readable image ({error}); replace or remove it") from None

    def subset(self, indices: list[int]) -> "Examples":
        """Return some of the examples."""
        labels = tuple(self.labels[i] for i in indices)
        return Examples(self.class_names, labels, lambda i: self.load(indices[i]), lambda i: self.origin(indices[i]))


def _as_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
