"""Several processes share the batches of a task, and add up what they found."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sized

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keeplora.layers.module_state import device_of
from keeplora.progress import Track
from keeplora.task import Batch, Task, to_device


def batches_of(model: nn.Module, task: Task, share: float, track: Track, what: str) -> Iterator[Batch]:
    """Yield this process's part of a share of the batches, on the model's device."""
    batches: Iterable[Batch] = task.batches()
    total = len(batches) if isinstance(batches, Sized) else None
    if share < 1:
        if total is None:
            raise ValueError(
                f"task {task.name!r}: a share of {share} of the batches needs their number; let batches() return a"
                " list or a DataLoader"
            )
        total = share_of(total, share)
        batches = itertools.islice(batches, total)
    rank, num_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if total is not None:
        if 0 < total < num_processes:
            raise ValueError(
                f"task {task.name!r} has {total} batches for {num_processes} processes; use fewer processes"
            )
        total = len(range(rank, total, num_processes))
    batches = track(itertools.islice(batches, rank, None, num_processes), f"{task.name}: {what}", total)
    for batch in batches:
        yield to_device(batch, device_of(model))


def share_of(num_batches: int, share: float) -> int:
    """Return how many batches a share of them is, rounded up."""
    return math.ceil(round(share * num_batches, 6))  # 0.07 * 100 is a little above 7


def sum_over_processes(tensors: dict[str, Tensor], count: int) -> int:
    """Add tensors up over all processes, in place, and a count."""
    if not dist.is_initialized():
        return count
    for tensor in tensors.values():
        dist.all_reduce(tensor)
    total = torch.tensor(count, device=next(iter(tensors.values())).device)
    dist.all_reduce(total)
    return int(total)
