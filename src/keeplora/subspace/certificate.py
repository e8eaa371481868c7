"""Certificates: how much of a task's updates lies inside what was protected when the task began."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from keeplora.errors import LearningError
from keeplora.subspace import linear_algebra as linalg

LEAK_ALLOWED = 1e-4  # A larger share of an update inside the protected subspace is an error (float32).


@dataclass(frozen=True)
class LayerCertificate:
    """What was checked of one layer after one task."""

    leak: float
    """`||dW basis||_F / ||dW||_F` against what was protected when the task began; 0 if the layer did not change."""
    orthonormality: float  # `max |basis^T basis - I|` after the task's directions were added.
    residual_dims: int  # Input dimensions that no basis covers yet.
    protected_dims: int  # Input dimensions that are protected after the task.
    rank: int  # Rank of the layer's update; 0 if the layer was left alone.


def leak(a: Tensor, b: Tensor, basis: Tensor) -> float:
    """Return `||b a basis||_F / ||b a||_F`, the share of an update that falls inside a protected subspace."""
    return linalg.share_of_norm(b @ (a @ basis), b @ a)


def require_no_leak(
    updates: dict[str, tuple[Tensor, Tensor]], bases: dict[str, Tensor], task: str, *, allowed: float = LEAK_ALLOWED
) -> None:
    """Raise a `ValueError` if an update, given as factors `(a, b)`, is not finite or lies too far inside a basis."""
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
    """Check a task's updates, factors `(a, b)` of adapted layers, by the bases before it and with its directions."""
    certificate = {}
    for name, basis in before.items():
        d_in, k = after[name].shape
        share, rank = (leak(*updates[name], basis), len(updates[name][0])) if name in updates else (0.0, 0)
        certificate[name] = LayerCertificate(share, linalg.orthonormality_error(after[name]), d_in - k, k, rank)
    return certificate


def certificate_to_json(certificate: dict[str, LayerCertificate]) -> dict[str, object]:
    """Turn a certificate into plain values: every layer, and the worst over layers."""
    if not certificate:
        return {}
    layers = {name: asdict(layer) for name, layer in certificate.items()}
    worst_of = {"leak": max, "orthonormality": max, "residual_dims": min}
    worst = {key: find(layer[key] for layer in layers.values()) for key, find in worst_of.items()}
    return {"worst": worst, "layers": layers}
