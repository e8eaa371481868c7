"""The places at which training can be cut off and taken up again: all that changes in it, as one state."""

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
from keeplora.training.random_state import capture_order, capture_random, restore_order, restore_random
from keeplora.training.state_file import State

EXTRA = "_extra_state"
"""Ends the names of what modules keep beside their parameters and buffers (`nn.Module.get_extra_state`)."""


@dataclass(frozen=True)
class Checkpoints:
    """Where training can be taken up again, and where it puts such places."""

    last: State | None = None
    """What `keep` was given last, if training was cut off after it."""
    keep: Callable[[State], None] = lambda state: None
    """Puts a state away for later."""
    steps: int | None = None
    """Optimiser steps from one to the next; only at the end of each epoch if not given."""
    seconds: float = float("inf")
    """The most seconds from one to the next."""
    generators: tuple[torch.Generator, ...] = ()
    """What the order of the batches is drawn from."""


NO_CHECKPOINTS = Checkpoints()
"""Training that starts at the beginning and is lost when it is cut off."""


class TrainingState:
    """How far training is. Takes up the last checkpoint, and makes one when it is time.

    A checkpoint holds what is trained, the optimiser, the schedule, the scaler of mixed precision, every random
    generator, the order of the epoch's batches and how many of them are done, and the losses.
    """

    def __init__(
        self, checkpoints: Checkpoints, model: nn.Module, parts: dict[str, Any], scaler: Any, epochs: int
    ) -> None:
        self.checkpoints = checkpoints
        self.epochs = epochs
        self.model = model
        self.parts = parts if scaler is None else {**parts, "scaler": scaler}
        self.epoch = 0
        self.batch = 0
        self.losses: list[float] = []
        self._of_epoch: list[tuple[float, float]] = []
        self._order = capture_random(checkpoints.generators)
        self._random: State | None = None
        self._steps = 0
        self._since = time.monotonic()
        if checkpoints.last is not None:
            self._take_up(checkpoints.last)

    def rest_of_epoch(self, batches: Iterable[Any], skip: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
        """Yield the batches of an epoch that are not done yet, in the order that the epoch began with.

        Args:
            batches: All batches of an epoch.
            skip: Returns a data loader without its first ones.
        """
        if self._random is None:
            self._order = capture_random(self.checkpoints.generators)
            yield from batches
            return
        restore_random(self._order, self.checkpoints.generators)
        is_loader = isinstance(batches, DataLoader)
        rest = skip(self.batch) if is_loader and self.batch else itertools.islice(batches, self.batch, None)
        for number, batch in enumerate(rest):
            if number == 0:
                # Finding the place has drawn from the generators; training goes on with what it had.
                order, random, self._random = capture_order(self.checkpoints.generators), self._random, None
                restore_random(random, self.checkpoints.generators)
                restore_order(order, self.checkpoints.generators)
            yield batch

    def add(self, loss: float, weight: float) -> None:
        """Count a batch, its loss and its weight."""
        self.batch += 1
        self._of_epoch.append((loss, weight))

    def after_step(self, *, is_last: bool) -> None:
        """Count an optimiser step, the last one of an epoch or not, and put a checkpoint away if it is time."""
        self._steps += 1
        if is_last:
            total = sum(weight for _, weight in self._of_epoch)
            self.losses.append(sum(loss * weight for loss, weight in self._of_epoch) / total)
            self.epoch, self.batch, self._of_epoch = self.epoch + 1, 0, []
        every = self.checkpoints.steps
        due = (self._steps >= every if every else is_last) or self.epoch == self.epochs
        if self.checkpoints is not NO_CHECKPOINTS and (due or self._is_late()):
            self.checkpoints.keep(self._state())
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
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": self.losses,
            "of_epoch": self._of_epoch,
            "order": self._order,
            "random": capture_random(self.checkpoints.generators),
            "trained": dict(self._trained()),
            "extra": _of_all_processes(
                {name: value for name, value in self.model.state_dict().items() if name.endswith(EXTRA)},
                device_of(self.model),
            ),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _take_up(self, state: State) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.losses, self._of_epoch = state["losses"], state["of_epoch"]
        self._order, self._random = state["order"], state["random"]
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(state["trained"][name])
        if dist.is_initialized() and len(state["extra"]) != dist.get_world_size():
            raise ValueError(
                f"training was cut off in {len(state['extra'])} processes and cannot go on in {dist.get_world_size()};"
                " start as many"
            )
        self.model.load_state_dict(state["extra"][dist.get_rank() if dist.is_initialized() else 0], strict=False)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if self.batch == 0:
            self._resume_between_epochs()

    def _resume_between_epochs(self) -> None:
        assert self._random is not None
        restore_random(self._random, self.checkpoints.generators)
        self._random = None

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)


def _of_all_processes(extra: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """Return what the modules of every process keep beside their parameters: each counts what it has seen itself."""
    if not dist.is_initialized():
        return [extra]
    found: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    for name, value in extra.items():
        value = value.to(device)
        parts = [torch.empty_like(value) for _ in found]
        dist.all_gather(parts, value)
        for mine, part in zip(found, parts, strict=True):
            mine[name] = part
    return found
