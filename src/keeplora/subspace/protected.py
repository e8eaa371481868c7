"""Protected subspaces: what later updates of a layer must stay orthogonal to.

A basis `[d_in, k]` per target layer starts as the principal input directions of the pre-trained weight (W_p, Eq. 2 of
the KeepLoRA paper, arXiv 2601.19659) and grows by the dominant input directions of every task (M_t, Eq. 9 and 10).
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from keeplora.errors import LearningError
from keeplora.subspace import linear_algebra as linalg

LEAK_ALLOWED = 1e-4
"""A larger share of an update inside the protected subspace is an error (float32)."""

ROUNDING = 1e-6
"""Energies below this share of the total are rounding noise (float32)."""


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


def principal_bases(weights: dict[str, Tensor], shares: dict[str, float]) -> dict[str, Tensor]:
    """Return the principal input directions of each weight: the fewest with a share of its squared norm (Eq. 2).

    Args:
        weights: `[d_out, d_in]` for each layer.
        shares: The energy share (eps_w) for each layer.

    Returns:
        For each layer the leading right singular vectors `[d_in, p]` in float32.
    """
    return {
        name: linalg.principal_directions(weight.detach().float(), shares[name]).contiguous()
        for name, weight in weights.items()
    }


def new_directions(bases: dict[str, Tensor], grams: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Find the fewest directions that bring the covered energy of each layer's inputs to a share (Eq. 9 and 10).

    The share (eps_f) is of the inputs' TOTAL energy; what the basis covers already counts.

    Returns:
        For each layer `[d_in, m]`, orthonormal and orthogonal to its basis; `m` is 0 where the basis suffices.
    """
    return {name: linalg.residual_directions(grams[name], basis, share).contiguous() for name, basis in bases.items()}


def leading_inputs(gram: Tensor, basis: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    """Return the input directions that carry most of the energy a basis leaves, as orthonormal rows `[<= rank, d_in]`.

    Fewer than `rank` where fewer dimensions are free, or carry more energy than rounding explains; perhaps none.
    """
    room = min(rank, basis.shape[0] - basis.shape[1])
    if room == 0:
        return gram.new_zeros(0, basis.shape[0])
    _, energies, rows = linalg.low_rank(linalg.residual_gram(gram, basis), room, seed=seed)
    return linalg.orthonormal_rows(rows[energies > ROUNDING * float(gram.trace())], basis)


def extend_bases(bases: dict[str, Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append to each basis the directions that a task added."""
    return {name: torch.cat([basis, directions[name]], dim=1) for name, basis in bases.items()}


def take_out(bases: dict[str, Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return bases without the columns that a task once appended to them."""
    rest = {}
    for name, basis in bases.items():
        added = directions[name].to(basis.device)
        n = added.shape[1]
        places = [i for i in range(basis.shape[1] - n + 1) if torch.equal(basis[:, i : i + n], added)]
        assert places, f"the directions of layer {name!r} are not in its basis"
        rest[name] = torch.cat([basis[:, : places[0]], basis[:, places[0] + n :]], dim=1)
    return rest


def without_last(bases: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the least direction of each basis: the released code's energy rule, for comparison."""
    return {name: basis[:, :-1].contiguous() for name, basis in bases.items()}


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
