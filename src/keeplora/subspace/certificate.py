"""Certificates: how much of a task's updates lies inside what was protected when the task began."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from keeplora.errors import LearningError
from keeplora.subspace import linear_algebra as linalg

LEAK_ALLOWED = 1e-4
"""A larger share of an update inside the protected subspace is an error (float32)."""


@dataclass(frozen=True)
class LayerCertificate:
    """What was checked for one layer after one task."""

    leak: float
    """`||dW basis||_F / ||dW||_F` against what was protected when the task began; 0 if the layer did not change."""
    orthonormality: float
    """`max |basis^T basis - I|` after the task's directions were added."""
    residual_dims: int
    """Input dimensions that no basis covers yet."""
    protected_dims: int
    """Input dimensions that are protected after the task."""
    rank: int
    """Rank of the layer's update; 0 if the layer was left alone."""


def share_of_norm(part: Tensor, whole: Tensor) -> float:
    """Return `||part||_F / ||whole||_F`, 0 for nothing of nothing."""
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0


def leak(a: Tensor, b: Tensor, basis: Tensor) -> float:
    """Return `||b a basis||_F / ||b a||_F`, the share of an update that falls inside a protected subspace."""
    norm = float((b @ a).norm())
    return float((b @ (a @ basis)).norm()) / norm if norm > 0 else 0.0


def require_no_leak(
    updates: dict[str, tuple[Tensor, Tensor]], bases: dict[str, Tensor], task: str, *, allowed: float = LEAK_ALLOWED
) -> None:
    """Check that updates, given as their factors `(a, b)`, stay outside the protected subspaces.

    Raises:
        LearningError: If an update is not finite.
        ValueError: If more than the allowed share of one lies in the protected subspace.
    """
    for name, (a, b) in updates.items():
        if not torch.isfinite(b).all():
            raise LearningError(f"task {task!r}: the trained update of layer {name!r} is not finite")
        if (share := leak(a, b, bases[name])) > allowed:
            raise ValueError(
                f"task {task!r}: {share:.2g} of the update of layer {name!r} lies in the protected subspace, more than"
                f" {allowed:g}; was `a` trained or replaced outside keeplora?"
            )


def certificates(
    before: dict[str, Tensor], after: dict[str, Tensor], updates: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, LayerCertificate]:
    """Check one task's updates against what was protected when it began.

    Args:
        before: The bases when the task began.
        after: The bases with the task's directions.
        updates: The factors `(a, b)` of every layer that was adapted.
    """
    certificate = {}
    for name, basis in before.items():
        a, b = updates.get(name, (None, None))
        certificate[name] = LayerCertificate(
            leak=0.0 if a is None or b is None else leak(a, b, basis),
            orthonormality=linalg.orthonormality_error(after[name]),
            residual_dims=after[name].shape[0] - after[name].shape[1],
            protected_dims=after[name].shape[1],
            rank=0 if a is None else a.shape[0],
        )
    return certificate


def certificate_to_json(certificate: dict[str, LayerCertificate]) -> dict[str, object]:
    """Turn a certificate into plain values: every layer, and the worst over layers."""
    if not certificate:
        return {}
    worst = {
        "leak": max(layer.leak for layer in certificate.values()),
        "orthonormality": max(layer.orthonormality for layer in certificate.values()),
        "residual_dims": min(layer.residual_dims for layer in certificate.values()),
    }
    return {"worst": worst, "layers": {name: asdict(layer) for name, layer in certificate.items()}}
