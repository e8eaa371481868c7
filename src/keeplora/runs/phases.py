"""The durable phases of the task that is being learned: each is computed once, however often the run is cut off.

What a phase found is put into the run directory together with the state of every random generator behind it, so that a
resumed run goes on with the same draws. When the task is finished, all of it is removed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.task import to_device
from keeplora.training.checkpoints import Checkpoints
from keeplora.training.profiling import Clock, Phases
from keeplora.training.random_state import capture_random, restore_random
from keeplora.training.state_file import State, from_bytes, to_bytes

TRAINING = "train"


class Unfinished:
    """Keeps what one task has finished so far in the directory; `clock` measures its phases over all attempts."""

    def __init__(
        self, directory: RunDirectory, task: str, device: torch.device, generators: tuple[torch.Generator, ...]
    ) -> None:
        self.directory = directory
        self.task = task
        self.device = device
        self.generators = generators
        self.clock = Clock(directory.manifest.get("now", {}).get("phases"))
        self._num_checkpoints = 0
        self._inside: list[set[str]] = []

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what a phase found: from the directory if it is there, otherwise computed now and put there.

        What other phases found while this one was computed went into it, and is dropped from the directory.
        """
        file = f"{UNFINISHED}/{name}.safetensors"
        if file in self.directory.files:
            state = self._state(file)
            restore_random(state["random"], self.generators)
            if self._inside:
                self._inside[-1].add(file)
            return dict(to_device(state["tensors"], self.device))
        self._inside.append(set())
        with self.clock.phase(name):
            tensors = compute()
        for used in self._inside.pop():
            self.directory.remove(used)
        if self._inside:
            self._inside[-1].add(file)
        self.directory.write(file, to_bytes({"tensors": tensors, "random": capture_random(self.generators)}))
        self._commit(name)
        return tensors

    def checkpoints(self, steps: int | None, seconds: float) -> Checkpoints:
        """Return where training is taken up again, and how it puts such places into the directory."""
        found = sorted(name for name in self.directory.files if name.startswith(f"{UNFINISHED}/{TRAINING}-"))
        last = self._state(found[-1]) if found else None
        self._num_checkpoints = int(found[-1].split("-")[-1].split(".")[0]) if found else 0
        return Checkpoints(last, self._keep, steps, seconds, self.generators)

    def forget(self) -> None:
        """Drop everything that this task has finished so far."""
        self.directory.remove(f"{UNFINISHED}/")
        self.directory.manifest.pop("now", None)
        self.directory.commit()

    def phases(self) -> Phases:
        """Return the seconds and the peak memory of every phase, over all attempts."""
        return self.clock.read()

    def _keep(self, state: State) -> None:
        """Put a checkpoint in the place of the one before it."""
        self.directory.remove(f"{UNFINISHED}/{TRAINING}-")
        self._num_checkpoints += 1
        self.directory.write(f"{UNFINISHED}/{TRAINING}-{self._num_checkpoints:06d}.safetensors", to_bytes(state))
        self._commit(TRAINING)

    def _commit(self, phase: str) -> None:
        self.directory.manifest["now"] = {"task": self.task, "phase": phase, "phases": self.phases()}
        self.directory.commit()

    def _state(self, file: str) -> Any:
        content = self.directory.read(file)
        try:
            return from_bytes(content)
        except ValueError as error:
            raise ValueError(f"{self.directory.folder / file}: {error}") from None
