"""Images as a vision tower wants them: decoded and resized once, kept as bytes, normalised a batch at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from keeplora.collect import Track
from keeplora.examples import Examples

Item = tuple[Tensor, int]

MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels that are kept in memory; splits beyond it are decoded again at every use."""

READ_AT_ONCE = 64

_KEPT: list[tuple[dict[Any, Tensor], int]] = []
"""The innermost pair is what holds the pixels that `kept` keeps, and the most bytes of them."""


@contextmanager
def kept(memory_limit: int = MEMORY_LIMIT) -> Iterator[None]:
    """Keep the pixels that are read inside in memory, so that a second run on the same data decodes nothing again."""
    _KEPT.append(({}, memory_limit))
    try:
        yield
    finally:
        _KEPT.pop()


class Pixels(Dataset[Item]):
    """A split as uint8 images `[3, height, width]` and labels."""

    def __init__(
        self, labels: tuple[int, ...], pixels_of: Callable[[int], Tensor], normalise: Callable[[Tensor], Tensor]
    ) -> None:
        self.labels = labels
        self.pixels_of = pixels_of
        self.normalise = normalise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.pixels_of(index), self.labels[index]

    def collate(self, items: list[Item]) -> dict[str, Tensor]:
        """Stack items to `pixel_values [n, 3, height, width]`, float and normalised, and `labels [n]`."""
        pixels = torch.stack([item[0] for item in items])
        return {"pixel_values": self.normalise(pixels), "labels": torch.tensor([item[1] for item in items])}


class PixelStore:
    """Reads splits through one image processor and keeps their pixels while memory allows."""

    def __init__(self, processor: Any, memory_limit: int | None = None) -> None:
        self.processor = processor
        self.normalise = normaliser(processor)
        self.kept, most = _KEPT[-1] if _KEPT else ({}, MEMORY_LIMIT)
        self.left = (most if memory_limit is None else memory_limit) - sum(
            pixels.numel() for pixels in self.kept.values()
        )

    def read(self, examples: Examples, track: Track, description: str) -> Pixels:
        """Decode and resize every image once, so that an unreadable one is found now.

        Raises:
            ValueError: If an image cannot be read; the message names it.
        """
        key = (self.processor.to_json_string(), *(examples.origin(i) for i in range(len(examples))))
        if key not in self.kept:
            self._decode(examples, key, track, description)
        if key not in self.kept:
            return Pixels(examples.labels, lambda i: self._resized([examples.image(i)])[0], self.normalise)
        pixels = self.kept[key]
        return Pixels(examples.labels, lambda i: pixels[i], self.normalise)

    def _decode(self, examples: Examples, key: Any, track: Track, description: str) -> None:
        """Read every image; keep the pixels if they fit."""
        pixels: Tensor | None = None
        starts = range(0, len(examples), READ_AT_ONCE)
        for start in track(starts, description, len(starts)):
            chunk = self._resized([examples.image(i) for i in range(start, min(start + READ_AT_ONCE, len(examples)))])
            if start == 0 and chunk[0].numel() * len(examples) <= self.left:
                pixels = chunk.new_empty(len(examples), *chunk.shape[1:])
                self.left -= pixels.numel()
            if pixels is not None:
                pixels[start : start + len(chunk)] = chunk
        if pixels is not None:
            self.kept[key] = pixels

    def _resized(self, images: list[Any]) -> Tensor:
        values = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.asarray(values, dtype=np.uint8))


def normaliser(processor: Any) -> Callable[[Tensor], Tensor]:
    """Return the last steps of an image processor, rescaling and normalisation, as a function on uint8 batches."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    shift = torch.tensor(mean).view(3, 1, 1)
    scale = torch.tensor(std).view(3, 1, 1)

    def normalise(pixels: Tensor) -> Tensor:
        return (pixels.float() * factor - shift) / scale

    return normalise
