"""Several processes share the batches of a task, and add up what they found."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keeplora.errors import LearningError
from keeplora.layers.module_state import device_of
from keeplora.progress import Track
from keeplora.task import Batch, Task, to_device


def batches_of(model: nn.Module, task: Task, share: float, track: Track, what: str) -> Iterator[Batch]:
    """Yield this process's part of a share of the batches, on the model's device."""
    batches: Iterable[Batch] = task.batches()
    total = len(batches) if isinstance(batches, Sized) else None
    if share < 1:
        if total is None:
            message = f"task {task.name!r}: a share of {share} of the batches needs their number"
            raise ValueError(f"{message}; let batches() return a list or a DataLoader")
        total = share_of(total, share)
        batches = itertools.islice(batches, total)
    rank, num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if total is not None:
        if 0 < total < num_processes:
            message = f"task {task.name!r} has {total} batches for {num_processes} processes"
            raise ValueError(f"{message}; use fewer processes")
        total = len(range(rank, total, num_processes))
    for batch in track(itertools.islice(batches, rank, None, num_processes), f"{task.name}: {what}", total):
        yield to_device(batch, device_of(model))


def share_of(num_batches: int, share: float) -> int:
    """Return how many batches a share of them is, rounded up."""
    return math.ceil(round(share * num_batches, 6))  # 0.07 * 100 is a little above 7


def add_up(*tensors: Tensor) -> None:
    """Add each tensor up over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def total_of(number: float, device: torch.device) -> float:
    """Return the sum of a number over all processes."""
    if not dist.is_initialized():
        return number
    add_up(total := torch.tensor(number, dtype=torch.float64, device=device))
    return float(total)


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes with an error if one ends with one inside, where none waits for another: else they would."""
    flaw = "another process ended with an error"
    try:
        yield
        flaw = ""
    except ValueError as error:
        flaw = str(error)
        raise
    finally:
        found = texts_of(flaw)
    if found:
        raise LearningError(found[0])


def texts_of(text: str) -> list[str]:
    """Return the texts of all processes that are not empty."""
    if not dist.is_initialized():
        return [text] if text else []
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return [one for one in texts if one]


def is_main_process() -> bool:
    """Tell whether this is the first of several processes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
