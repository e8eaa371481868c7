"""Bytes that are too many for memory: in a temporary file that is mapped and goes with the last reference to it."""

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def map_bytes(chunks: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Write chunks of uint8 one after the other to a temporary file and return them as one tensor that reads from it.

    On POSIX the file has no name once it is open: a process that is killed leaves nothing behind.

    Args:
        chunks: Together as many bytes as the shape has.
        shape: Of the result.

    Raises:
        ValueError: If the folder for temporary files has no room for so much, or cannot be written or mapped.
    """
    size = math.prod(shape)
    with _naming("the folder for temporary files", size):
        folder = tempfile.gettempdir()
    with _naming(folder, size):
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (only what fails in the file is named)
    with file:
        for chunk in chunks:
            with _naming(folder, size):
                _write(file.fileno(), chunk)
        with _naming(folder, size):
            os.fsync(file.fileno())  # Some file systems tell only now that they are full.
            return torch.from_numpy(np.memmap(file, np.uint8, mode="r+", shape=shape))


def _write(number: int, chunk: Tensor) -> None:
    """Write all of a chunk past any buffer: what a buffer could not write, it would try again when it is closed."""
    left = np.ascontiguousarray(chunk.numpy()).reshape(-1).data
    while left:
        left = left[os.write(number, left) :]


@contextmanager
def _naming(folder: str, size: int) -> Iterator[None]:
    """Name the folder, the bytes and the cure where the system refuses."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{size:,} bytes of images, more than is kept in memory, cannot be put in {folder} ({error}); set TMPDIR to"
            " a folder with so much space"
        ) from None
