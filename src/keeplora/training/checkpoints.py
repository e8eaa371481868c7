"""Checkpoints of training: all that changes in it, as one state that it resumes from."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keeplora.layers.module_state import device_of
from keeplora.training.state_file import State, capture_random, restore_random

EXTRA = "_extra_state"
"""Ends the names of what modules keep beside their parameters and buffers (`nn.Module.get_extra_state`)."""


@dataclass(frozen=True)
class Checkpoints:
    """What training resumes from, and what happens to its checkpoints."""

    last: State | None = None  # The last checkpoint, if training was cut off after one.
    keep: Callable[[State], None] | None = None  # Puts a checkpoint away for later; without it none is made.
    steps: int | None = None
    """Optimiser steps from one checkpoint to the next; one at the end of each epoch if not given."""
    seconds: float = math.inf  # The most seconds from one checkpoint to the next.
    generators: tuple[torch.Generator, ...] = ()  # What the order of the batches is drawn from.


class TrainingState:
    """How far training is. Resumes from the last checkpoint, and makes one when it is due.

    A checkpoint holds what is trained, the optimiser, the schedule, the scaler of mixed precision, every random
    generator, the order of the epoch's batches and how many of them are done, and the losses.
    """

    def __init__(self, checkpoints: Checkpoints, model: nn.Module, parts: dict[str, Any], epochs: int) -> None:
        self.checkpoints = checkpoints
        self.model = model
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.epochs = epochs
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.losses: list[float] = []
        """Of the epochs that are done."""
        self.of_epoch: list[tuple[float, float]] = []
        """Losses and weights of the batches that are done of the epoch after them."""
        self._order = capture_random(checkpoints.generators)
        self._random: State | None = None
        self._steps, self._since = 0, time.monotonic()
        if checkpoints.last is not None:
            self._resume(checkpoints.last)

    def rest_of_epoch(self, batches: Iterable[Any], skip: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
        """Yield the batches of an epoch that are not done yet; `skip` returns a data loader without its first ones."""
        if self._random is None:
            self._order = capture_random(self.checkpoints.generators)
        else:
            restore_random(self._order, self.checkpoints.generators)
        done = len(self.of_epoch)
        rest = skip(done) if done and isinstance(batches, DataLoader) else itertools.islice(batches, done, None)
        for batch in rest:
            if self._random is not None:
                # Skipping has drawn numbers: all but the order of the batches is drawn as from the checkpoint on.
                restore_random(self._random)
                self._random = None
            yield batch

    def after_step(self, *, is_last: bool) -> None:
        """Count an optimiser step, the last one of an epoch or not, and put a checkpoint away if one is due."""
        self._steps += 1
        if is_last:
            total = sum(weight for _, weight in self.of_epoch)
            self.losses.append(sum(loss * weight for loss, weight in self.of_epoch) / total)
            self.of_epoch = []
        every, keep = self.checkpoints.steps, self.checkpoints.keep
        is_due = (self._steps >= every if every else is_last) or len(self.losses) == self.epochs
        if keep and (is_due or self._is_late()):
            keep(self._state())
            self._steps, self._since = 0, time.monotonic()

    def _is_late(self) -> bool:
        """Tell whether the last checkpoint is too long ago, in all processes alike: by the clock of the first one."""
        is_late = time.monotonic() - self._since >= self.checkpoints.seconds
        if dist.is_initialized() and math.isfinite(self.checkpoints.seconds):
            answer = torch.tensor(is_late, device=device_of(self.model))
            dist.broadcast(answer, 0)
            is_late = bool(answer)
        return is_late

    def _state(self) -> State:
        extra = {name: value for name, value in self.model.state_dict().items() if name.endswith(EXTRA)}
        return {
            "epoch": len(self.losses),
            "batch": len(self.of_epoch),
            "losses": self.losses,
            "of_epoch": self.of_epoch,
            "order": self._order,
            "random": capture_random(self.checkpoints.generators),
            "trained": self._trained,
            "extra": _of_all_processes(extra, device_of(self.model)),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _resume(self, state: State) -> None:
        self.losses, self.of_epoch = state["losses"], state["of_epoch"]
        self._order, self._random = state["order"], state["random"]
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state["trained"][name])
        if dist.is_initialized() and len(state["extra"]) != dist.get_world_size():
            raise ValueError(
                f"training was cut off in {len(state['extra'])} processes and cannot resume in {dist.get_world_size()};"
                " start as many"
            )
        self.model.load_state_dict(state["extra"][dist.get_rank() if dist.is_initialized() else 0], strict=False)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if not self.of_epoch:  # Between two epochs there is no order to follow.
            restore_random(self._random, self.checkpoints.generators)
            self._random = None


def _of_all_processes(extra: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """Return what the modules of every process keep beside their parameters: each counts what it has seen itself."""
    if not dist.is_initialized():
        return [extra]
    found: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    for name, value in extra.items():
        copies = [torch.empty_like(value, device=device) for _ in found]
        dist.all_gather(copies, value.to(device))
        for one, copy in zip(found, copies, strict=True):
            one[name] = copy
    return found
