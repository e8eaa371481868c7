"""Joint training: all tasks at once, from the untouched model. Not a continual method but the reference above them.

The first place of the stream learns the union of all tasks, with as many steps and the rank that they have one by one;
the others learn nothing. So every row of the accuracy matrix is the same model, and only Last speaks of it.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keeplora.layers import weights
from keeplora.methods.base import Method, TaskRecord
from keeplora.task import Batch, DeferredGradient, Task


class LoRAFT(Method):
    """Train a fresh LoRA on each task and merge it (Hu et al., 2022); both factors are trained."""


class ZeroShot(Method):
    """Learn nothing."""

    has_settings: ClassVar[bool] = False

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model with every parameter frozen."""
        self.snapshot(model)
        return model.requires_grad_(False)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        self.record = TaskRecord()
        return self.restore(model)


class Joint(Method):
    """Train one LoRA, of the rank of all tasks together, on their batches in mixed order, and merge it."""

    one_by_one: ClassVar[bool] = False
    stands_alone: ClassVar[bool] = False

    def start(self) -> None:
        self.is_done = False
        self._num_tasks = 1

    def schedule(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Return the union of the tasks for every place of the stream; they must ask for one number of epochs."""
        if len({getattr(task, "epochs", None) for task in tasks}) > 1:
            raise ValueError("joint training needs one number of epochs for all tasks; take `epochs` out of [[tasks]]")
        if dist.is_initialized():
            raise ValueError("joint training works in one process only; run without a launcher")
        self._num_tasks = len(tasks)
        return [Union(tasks, self.seed)] * len(tasks)

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model to train at the first place, the model with every parameter frozen at the others."""
        if self.is_done:
            self.snapshot(model)
            return model.requires_grad_(False)
        targets = self.targets_of(model)
        sides = {name: min(weights.shape_of(model, name)) for name in targets}
        ranks = {name: max(self.config.rank, min(self._num_tasks * self.config.rank, sides[name])) for name in targets}
        return self.attach(model, ranks)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        if not self.is_done:
            return super().after_task(model, task)
        self.keep(TaskRecord())
        return self.restore(model)

    def add_task(self, record: TaskRecord) -> None:
        self.is_done = True


class Union(Task):
    """Several tasks as one: each batch is a batch of one of them, with the place of that task before it."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self.name = "all tasks"
        self.tasks = tasks
        self._batches = _Mixed(tasks, seed)

    def batches(self) -> "_Mixed":
        """Return the batches of all tasks, in a new random order each time; the orders follow from the seed."""
        return self._batches

    def generators(self) -> tuple[torch.Generator, ...]:
        return (self._batches.generator, *(found for task in self.tasks for found in task.generators()))

    def loss(self, model: nn.Module, batch: tuple[int, Batch]) -> Tensor:
        return self.tasks[batch[0]].loss(model, batch[1])

    def micro_batches(self, batch: tuple[int, Batch]) -> Iterable[tuple[int, Batch]]:
        return [(batch[0], part) for part in self.tasks[batch[0]].micro_batches(batch[1])]

    def sample(self, batch: tuple[int, Batch]) -> tuple[int, Batch]:
        return batch[0], self.tasks[batch[0]].sample(batch[1])

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[Sequence[DeferredGradient]]:
        with ExitStack() as inside:
            yield _Joined([inside.enter_context(task.frozen(model)) for task in self.tasks])

    def weight(self, batch: tuple[int, Batch]) -> float:
        return self.tasks[batch[0]].weight(batch[1])

    def padding_mask(self, layer: str, batch: tuple[int, Batch]) -> Tensor | None:
        return self.tasks[batch[0]].padding_mask(layer, batch[1])


class _Joined(Sequence[DeferredGradient]):
    """What several tasks hand out, at any time."""

    def __init__(self, found: list[Sequence[DeferredGradient]]) -> None:
        self.found = found

    def __len__(self) -> int:
        return sum(map(len, self.found))

    def __getitem__(self, index: Any) -> Any:
        return [one for own in self.found for one in own][index]


class _Mixed:
    """Draws from the tasks' batches in random order until all are used up."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self.tasks = tasks
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(self._counts())

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        turns = [index for index, count in enumerate(self._counts()) for _ in range(count)]
        iterators = [iter(task.batches()) for task in self.tasks]
        for turn in torch.randperm(len(turns), generator=self.generator).tolist():
            yield turns[turn], next(iterators[turns[turn]])

    def _counts(self) -> list[int]:
        return [len(cast(Sized, task.batches())) for task in self.tasks]
