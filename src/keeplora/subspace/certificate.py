"""Certificates: how much of a task's updates lies inside what was protected when the task began."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from keeplora.errors import LearningError
from keeplora.subspace import linear_algebra as linalg

LEAK_ALLOWED = 1e-4  # A larger share of an update inside the protected subspace is an error (float32).


@dataclass(frozen=True)
class Change:
    """What adding the update `b @ a` to a layer's weight changed in the weight, as stored: dW."""

    leak: float
    """`||dW basis||_F / ||dW||_F` against what is protected; 0 if nothing changed, or nothing is protected."""
    merge_loss: float
    """`||dW - b a||_F / ||b a||_F`: what rounding to the weight's precision lost of the update, or added to it."""
    rank: int
    """Rank of the update."""
    size: float
    """`||b a||_F`"""


@dataclass(frozen=True)
class LayerCertificate:
    """What was checked of one layer after one task."""

    leak: float
    """That of the change of the stored weight, against what was protected when the task began."""
    merge_loss: float  # What of the update is not in the stored weight; 0 if the layer was left alone.
    orthonormality: float  # `max |basis^T basis - I|` after the task's directions were added.
    residual_dims: int  # Input dimensions that no basis covers yet.
    protected_dims: int  # Input dimensions that are protected after the task.
    rank: int  # Rank of the layer's update; 0 if the layer was left alone.


def leak(a: Tensor, b: Tensor, basis: Tensor) -> float:
    """Return `||b a basis||_F / ||b a||_F`, the share of an update that falls inside a protected subspace."""
    return linalg.share_of_norm(b @ (a @ basis), b @ a)


def change_of(before: Tensor, after: Tensor, update: Tensor, basis: Tensor | None, rank: int) -> Change:
    """Compare a stored weight `[d_out, d_in]` before and after a merge with the update that was to be merged."""
    wide = torch.promote_types(after.dtype, torch.float32)
    change, update = after.to(wide) - before.to(wide), update.to(wide)
    lost = linalg.share_of_norm(change - update, update)
    leak = 0.0 if basis is None else linalg.share_of_norm(change @ basis.to(wide), change)
    return Change(leak, lost, rank, float(update.norm()))


def loss_of(changes: dict[str, Change]) -> float:
    """Return the merge loss of all layers together, `||dW - b a||_F / ||b a||_F` over their weights side by side."""
    lost = math.hypot(*(change.merge_loss * change.size for change in changes.values()))
    return lost / whole if (whole := math.hypot(*(change.size for change in changes.values()))) else 0.0


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


def certificates(bases: dict[str, Tensor], changes: dict[str, Change]) -> dict[str, LayerCertificate]:
    """Put together what a task changed in the layers, and the bases with the directions that it added."""
    certificate = {}
    for name, basis in bases.items():
        (d_in, k), change = basis.shape, changes.get(name, Change(0.0, 0.0, 0, 0.0))
        certificate[name] = LayerCertificate(
            leak=change.leak,
            merge_loss=change.merge_loss,
            orthonormality=linalg.orthonormality_error(basis),
            residual_dims=d_in - k,
            protected_dims=k,
            rank=change.rank,
        )
    return certificate


def certificate_to_json(certificate: dict[str, LayerCertificate]) -> dict[str, object]:
    """Turn a certificate into plain values: every layer, and the worst over layers."""
    if not certificate:
        return {}
    layers = {name: asdict(layer) for name, layer in certificate.items()}
    worst_of = {"leak": max, "merge_loss": max, "orthonormality": max, "residual_dims": min}
    worst = {key: find(layer[key] for layer in layers.values()) for key, find in worst_of.items()}
    return {"worst": worst, "layers": layers}
