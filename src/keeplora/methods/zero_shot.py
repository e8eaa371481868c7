"""Zero-shot: the pre-trained model as it is, the reference every method is compared with."""

from typing import ClassVar

from torch import nn

from keeplora.methods.base import Method
from keeplora.methods.task_record import TaskRecord
from keeplora.task import Task


class ZeroShot(Method):
    """Learn nothing."""

    has_settings: ClassVar[bool] = False

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model with every parameter frozen."""
        self.snapshot(model)
        return model.requires_grad_(False)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return the model as it was given."""
        self.record = TaskRecord()
        return self.restore(model)
