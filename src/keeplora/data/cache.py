"""Images as a vision tower wants them: decoded and resized once, kept as bytes, normalised a batch at a time."""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from keeplora.data.images import Examples
from keeplora.progress import Track

Item = tuple[Tensor, int]

MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels that are kept in memory; splits beyond it are kept in a temporary file, which is mapped."""

READ_AT_ONCE = 64


@dataclass
class Shelf:
    """Where pixels are kept, by processor and origin."""

    memory_left: int = MEMORY_LIMIT  # The bytes of further ones that may be in memory.
    pixels: dict[Any, Tensor] = field(default_factory=dict)


_KEPT: list[Shelf] = []  # The innermost is where `kept` keeps what is read.


@contextmanager
def kept(memory_limit: int = MEMORY_LIMIT) -> Iterator[None]:
    """Keep the pixels that are read inside, so that a second run on the same data decodes nothing again."""
    _KEPT.append(Shelf(memory_limit))
    try:
        yield
    finally:
        _KEPT.pop()


@dataclass(frozen=True, eq=False)
class Pixels(Dataset[Item]):
    """A split as uint8 images `[n, 3, height, width]` and labels."""

    labels: tuple[int, ...]
    pixels: Tensor
    normalise: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.pixels[index], self.labels[index]

    def collate(self, items: list[Item]) -> dict[str, Tensor]:
        """Stack items to `pixel_values [n, 3, height, width]`, float and normalised, and `labels [n]`."""
        pixels, labels = zip(*items, strict=True)
        return {"pixel_values": self.normalise(torch.stack(pixels)), "labels": torch.tensor(labels)}


class PixelStore:
    """Reads splits through one image processor and keeps their pixels: in memory while it allows, then on disk."""

    def __init__(self, processor: Any, memory_limit: int | None = None) -> None:
        self.processor = processor
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.normalise = lambda pixels: (pixels.float() * factor - shift) / scale
        self.shelf = Shelf(memory_limit) if memory_limit is not None else _KEPT[-1] if _KEPT else Shelf()

    def read(self, examples: Examples, track: Track, description: str) -> Pixels:
        """Decode and resize every image once, so that an unreadable one is found now."""
        key = (self.processor.to_json_string(), *(examples.origin(i) for i in range(len(examples))))
        if key not in self.shelf.pixels:
            first = next(rest := self._chunks(examples, track, description))
            chunks, shape = chain([first], rest), (len(examples), *first.shape[1:])
            if math.prod(shape) > self.shelf.memory_left:
                pixels = map_bytes(chunks, shape)
            else:
                pixels = first.new_empty(shape)
                for place, chunk in zip(pixels.split(len(first)), chunks, strict=True):
                    place.copy_(chunk)
                self.shelf.memory_left -= pixels.numel()
            self.shelf.pixels[key] = pixels
        return Pixels(examples.labels, self.shelf.pixels[key], self.normalise)

    def _chunks(self, examples: Examples, track: Track, description: str) -> Iterator[Tensor]:
        """Decode and resize the images in their order, some at a time."""
        starts = range(0, len(examples), READ_AT_ONCE)
        sizes: dict[tuple[int, ...], None] = {}
        for start in track(starts, description, len(starts)):
            decoded = [examples.image(i) for i in range(start, min(start + READ_AT_ONCE, len(examples)))]
            values = self.processor(decoded, do_rescale=False, do_normalize=False)["pixel_values"]
            images = [np.asarray(value) for value in values]
            sizes |= dict.fromkeys(image.shape[-2:] for image in images)
            if len(sizes) > 1:
                named = " and ".join(" x ".join(map(str, size)) for size in list(sizes)[:2])
                raise ValueError(
                    f"{description}: the model's image processor makes images of different sizes, {named}; let it crop"
                    " them (do_center_crop) or give both height and width in its preprocessor_config.json"
                )
            yield torch.from_numpy(np.stack(images).astype(np.uint8, copy=False))


def map_bytes(chunks: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Write chunks of uint8 to a temporary file, nameless where POSIX allows it, and return a tensor that maps it."""
    size = math.prod(shape)
    with _refusals_named(size):
        if (free := shutil.disk_usage(tempfile.gettempdir()).free) < size:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
        # Without a buffer: what one could not write, it would try again when it is closed.
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (only what fails in the file is named)
    with file:
        for chunk in chunks:
            left = np.ascontiguousarray(chunk.numpy()).reshape(-1).data
            while left:
                with _refusals_named(size):
                    left = left[os.write(file.fileno(), left) :]
        with _refusals_named(size):
            os.fsync(file.fileno())  # Some file systems tell only now that they are full.
            return torch.from_numpy(np.memmap(file, np.uint8, mode="r+", shape=shape))


@contextmanager
def _refusals_named(size: int) -> Iterator[None]:
    """Name the folder, the bytes and the cure where the system refuses."""
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "the folder for temporary files"
        raise ValueError(
            f"{size:,} bytes of images, more than is kept in memory, cannot be put in {folder} ({error}); set TMPDIR to"
            " a folder with so much space"
        ) from None
