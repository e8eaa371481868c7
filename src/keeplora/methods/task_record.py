"""What a method leaves behind after a task."""

from dataclasses import dataclass, field

from torch import Tensor

from keeplora.layers.lora import SavedAdapter
from keeplora.layers.weights import digest_of
from keeplora.subspace.certificate import LayerCertificate


@dataclass(frozen=True)
class TaskRecord:
    """What a method leaves behind after a task: all that is needed to replay it."""

    adapter: SavedAdapter | None = None
    directions: dict[str, Tensor] = field(default_factory=dict)
    """The directions `[d_in, k]` that the task added to each layer's protected subspace."""
    certificate: dict[str, LayerCertificate] = field(default_factory=dict)
    merge_error: float = 0.0
    """Largest difference of the outputs for a sample of a batch before and after the merge."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the task's own classifier, if it has one."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What else later tasks, or inference, need of this one."""
    merged: bool = True
    """Whether the adapter went into the weights; otherwise it stays beside them at inference, with `state`."""
    surviving_gradient: dict[str, float] = field(default_factory=dict)
    """The share of each layer's gradient norm that the protected subspace left to learn from."""

    @property
    def added_parameters(self) -> int:
        """How many parameters the task adds at inference: its head, and what was not merged."""
        beside = [] if self.merged or self.adapter is None else [*self.adapter.weights.values(), *self.state.values()]
        return sum(tensor.numel() for tensor in [*self.head.values(), *beside])

    def digest(self) -> str:
        """Return a hash of the update that the task left."""
        weights = {} if self.adapter is None else self.adapter.weights
        return digest_of((name, weights[name]) for name in sorted(weights))
