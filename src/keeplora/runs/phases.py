"""The durable phases of the task that is being learned: each is computed once, however often the run is cut off.

Its result is kept, until the task is finished, with the state of every random generator, so that the same is drawn.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from keeplora.errors import LearningError
from keeplora.methods.base import Method, Step
from keeplora.runs.directory import UNFINISHED, RunDirectory
from keeplora.task import to_device
from keeplora.training.checkpoints import Checkpoints
from keeplora.training.profiling import Clock
from keeplora.training.state_file import State, capture_random, from_bytes, pack, restore_random


@dataclass
class TaskPhases(AbstractContextManager["TaskPhases"]):
    """Keeps what one task has finished so far: the costly steps of the method, and training; `clock` measures phases.

    Leaving it with a `LearningError` drops all of that: another attempt with these settings would fail again.
    """

    directory: RunDirectory
    method: Method
    task: str
    device: torch.device
    generators: tuple[torch.Generator, ...]

    def __post_init__(self) -> None:
        self.clock = Clock(self.directory.manifest.get("now", {}).get("phases"))
        for step in self.method.steps:
            compute = getattr(type(self.method), step.name).__get__(self.method)
            setattr(self.method, step.name, partial(self.once, step, compute))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and issubclass(kind, LearningError):
            self.directory.remove(f"{UNFINISHED}/")
            self.directory.manifest.pop("now", None)
            self.directory.commit()

    def once(self, step: Step, compute: Callable[..., Any], *inputs: Any) -> Any:
        """Return what a phase found: from the run directory if it is there, otherwise computed now and put there."""
        if (state := self._read(step.name)) is not None:
            restore_random(state["random"], self.generators)
            tensors = to_device(state["tensors"], self.device)
            return tensors if step.kind is dict else step.kind.from_tensors(tensors)
        with self.clock.phase(step.name):
            result = compute(*inputs)
        tensors = result if step.kind is dict else result.to_tensors()
        if step.supersedes:
            self.directory.remove(f"{UNFINISHED}/{step.supersedes}.safetensors")
        self._write(step.name, {"tensors": tensors, "random": capture_random(self.generators)})
        return result

    def checkpoints(self, steps: int | None, seconds: float) -> Checkpoints:
        """Return the last checkpoint of training, and how further ones are put into the run directory."""
        return Checkpoints(self._read("train"), self._keep, steps, seconds, self.generators)

    def _keep(self, state: State) -> None:
        self._write("train", state)

    def _write(self, phase: str, state: State) -> None:
        self.directory.write_tensors(f"{UNFINISHED}/{phase}.safetensors", *pack(state))
        self.directory.manifest["now"] = {"task": self.task, "phase": phase, "phases": self.clock.read()}
        self.directory.commit()

    def _read(self, phase: str) -> State | None:
        if (file := f"{UNFINISHED}/{phase}.safetensors") not in self.directory.files:
            return None
        content = self.directory.read(file)
        try:
            return from_bytes(content)
        except ValueError as error:
            raise ValueError(f"{self.directory.folder / file}: {error}") from None
