"""The options of KeepLoRA: the paper's, its successors', and those that bring back what the released code does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from keeplora.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class KeepLoRAConfig(MethodConfig):
    """KeepLoRA's options; the defaults are the paper's for MTIL with CLIP ViT-B/16."""

    weight_energy: float | dict[str, float] = field(default_factory=lambda: {"vision": 0.85, "text": 0.2})
    """Share of each weight's energy that its principal subspace covers (eps_w): one value, or one for each tower, found
    by its name in the layer's."""
    feature_energy: float = 0.99
    """Share of each layer's input energy on a task that is protected after it (eps_f)."""
    gradient_share: float = 1.0
    """Share of the training batches that the gradient is taken from."""
    gradient: Literal["exact", "sketch"] = "exact"
    """`sketch` takes the leading directions of the gradient from two small random pictures of it, in place of the
    gradient itself: less memory where layers are wide."""
    b_start: Literal["zero", "gradient"] = "zero"
    """Start of B: zero with the weight untouched, or the residual gradient's factor with the weight reduced by it."""
    features: Literal["second_moment", "last_epoch", "batch_mean"] = "second_moment"
    """Statistic of the inputs: exact second moment; the same, collected in the last epoch of training, which saves a
    pass and is of slightly earlier weights; or the released code's average over batches."""
    weight_side: Literal["input", "output"] = "input"
    """Side of the weight whose singular vectors are its principal subspace: `output` is the released code's, for square
    layers only."""
    energy_rule: Literal["reach", "one_short"] = "reach"
    """Directions that are kept: the fewest that reach the share, or, as in the released code, one less for the weights
    and for the first task."""
    a_start: Literal["gradient", "random"] = "gradient"
    """Start of A: the top of the residual gradient, or random directions of the residual subspace (an ablation)."""
    a_training: Literal["frozen", "trained"] = "frozen"
    """`trained` lets the optimiser move A out of the residual subspace (an ablation); the certificate tells how far."""
    layer_scale: float = 1.0
    """KeepLoRA++: factor of the first block's update, growing linearly to 1 at the last."""
    classifier: Literal["none", "cosine"] = "none"
    """KeepLoRA+: `cosine` adds each learned task a cosine classifier on the image features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        energies = self.weight_energy if isinstance(self.weight_energy, Mapping) else {"": self.weight_energy}
        for tower, energy in energies.items():
            if not 0 <= energy <= 1:
                where = f" for {tower!r}" if tower else ""
                raise ValueError(f"weight_energy{where} = {energy} is a share; give a number from 0 to 1")
        for name in ("feature_energy", "layer_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is a share; give a number from 0 to 1")
        if not 0 < self.gradient_share <= 1:
            raise ValueError(f"gradient_share = {self.gradient_share} is a share; give a number above 0, at most 1")
        if self.gradient == "sketch" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs the gradient itself; set gradient = 'exact'")
        if self.a_start == "random" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs a_start = 'gradient'; set one of the two otherwise")
