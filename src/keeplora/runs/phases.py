"""The durable phases of the task that is being learned: each is computed once, however often the run is cut off.

What a phase found is put into the run directory together with the state of every random generator after it, so that a
resumed run draws the same numbers. When the task is finished, all of it is removed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from keeplora.methods.base import Method, Step
from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.task import Task, to_device
from keeplora.training.checkpoints import Checkpoints
from keeplora.training.profiling import Clock, Costs
from keeplora.training.state_file import State, capture_random, from_bytes, pack, restore_random

TRAINING = "train"


class TaskPhases:
    """Keeps what one task has finished so far in the run directory; `clock` measures its phases over all attempts."""

    def __init__(
        self, directory: RunDirectory, task: str, device: torch.device, generators: tuple[torch.Generator, ...]
    ) -> None:
        self.directory = directory
        self.task = task
        self.device = device
        self.generators = generators
        self.clock = Clock(directory.manifest.get("now", {}).get("phases"))
        self._num_checkpoints = 0

    def wrap(self, method: Method) -> None:
        """Let the costly steps of a method be phases of this task."""
        for step in method.steps:
            compute = getattr(type(method), step.name).__get__(method)
            setattr(method, step.name, partial(self._step, step, compute))

    def once(self, step: Step, compute: Callable[[], Any]) -> Any:
        """Return what a phase found: from the run directory if it is there, otherwise computed now and put there."""
        file = f"{UNFINISHED}/{step.name}.safetensors"
        if file in self.directory.files:
            state = self._state(file)
            restore_random(state["random"], self.generators)
            tensors = to_device(state["tensors"], self.device)
            return tensors if step.kind is dict else step.kind.from_tensors(tensors)
        with self.clock.phase(step.name):
            result = compute()
        tensors = result if step.kind is dict else result.to_tensors()
        if step.supersedes:
            self.directory.remove(f"{UNFINISHED}/{step.supersedes}.safetensors")
        self._write(file, {"tensors": tensors, "random": capture_random(self.generators)}, step.name)
        return result

    def checkpoints(self, steps: int | None, seconds: float) -> Checkpoints:
        """Return the last checkpoint of training, and how further ones are put into the run directory."""
        found = sorted(name for name in self.directory.files if name.startswith(f"{UNFINISHED}/{TRAINING}-"))
        last = self._state(found[-1]) if found else None
        self._num_checkpoints = int(found[-1].split("-")[-1].split(".")[0]) if found else 0
        return Checkpoints(last, self._keep, steps, seconds, self.generators)

    def drop(self) -> None:
        """Drop everything that this task has finished so far."""
        self.directory.remove(f"{UNFINISHED}/")
        self.directory.manifest.pop("now", None)
        self.directory.commit()

    def costs(self) -> Costs:
        """Return the seconds and the peak memory of every phase, over all attempts."""
        return self.clock.read()

    def _step(self, step: Step, compute: Callable[[nn.Module, Task], Any], model: nn.Module, task: Task) -> Any:
        return self.once(step, partial(compute, model, task))

    def _keep(self, state: State) -> None:
        """Put a checkpoint in the place of the one before it."""
        self.directory.remove(f"{UNFINISHED}/{TRAINING}-")
        self._num_checkpoints += 1
        self._write(f"{UNFINISHED}/{TRAINING}-{self._num_checkpoints:06d}.safetensors", state, TRAINING)

    def _write(self, file: str, state: State, phase: str) -> None:
        self.directory.write_tensors(file, *pack(state))
        self.directory.manifest["now"] = {"task": self.task, "phase": phase, "phases": self.costs()}
        self.directory.commit()

    def _state(self, file: str) -> Any:
        content = self.directory.read(file)
        try:
            return from_bytes(content)
        except ValueError as error:
            raise ValueError(f"{self.directory.folder / file}: {error}") from None
