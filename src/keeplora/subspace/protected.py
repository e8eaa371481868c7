"""Protected subspaces: what later updates of a layer must stay orthogonal to.

A basis `[d_in, k]` per target layer starts as the principal input directions of the pre-trained weight (W_p, Eq. 2 of
the KeepLoRA paper, arXiv 2601.19659) and grows by the dominant input directions of every task (M_t, Eq. 9 and 10).
"""

import torch
from torch import Tensor

from keeplora.subspace import linear_algebra as linalg

ROUNDING = 1e-6  # Energies below this share of the total are rounding noise (float32).


def principal_bases(weights: dict[str, Tensor], shares: dict[str, float]) -> dict[str, Tensor]:
    """Return the principal input directions of each weight, `[d_in, p]` in float32 (Eq. 2).

    They are the fewest leading right singular vectors with the layer's share (eps_w) of the squared norm.
    """
    return {
        name: linalg.principal_directions(weight.detach().float(), shares[name]).contiguous()
        for name, weight in weights.items()
    }


def new_directions(bases: dict[str, Tensor], grams: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Find the fewest directions `[d_in, m]` to cover a share (eps_f) of the TOTAL energy of each layer's inputs.

    What the basis covers already counts (Eq. 9 and 10).
    """
    return {name: linalg.residual_directions(grams[name], basis, share).contiguous() for name, basis in bases.items()}


def leading_inputs(gram: Tensor, basis: Tensor, rank: int, *, seed: int = 0) -> Tensor:
    """Return the input directions that carry most of the energy a basis leaves, as orthonormal rows `[<= rank, d_in]`.

    Fewer than `rank` where fewer dimensions are free, or carry more energy than rounding explains; perhaps none.
    """
    d_in, k = basis.shape
    if (capacity := min(rank, d_in - k)) == 0:
        return gram.new_zeros(0, d_in)
    _, energies, rows = linalg.low_rank(linalg.residual_gram(gram, basis), capacity, seed=seed)
    return linalg.orthonormal_rows(rows[energies > ROUNDING * float(gram.trace())], basis)


def extend_bases(bases: dict[str, Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append to each basis the directions that a task added."""
    return {name: torch.cat([basis, directions[name]], dim=1) for name, basis in bases.items()}


def remove_directions(bases: dict[str, Tensor], directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return bases without the columns that a task once appended to them."""
    rest = {}
    for name, basis in bases.items():
        added, n = directions[name].to(basis.device), directions[name].shape[1]
        places = [i for i in range(basis.shape[1] - n + 1) if torch.equal(basis[:, i : i + n], added)]
        assert places, f"the directions of layer {name!r} are not in its basis"
        rest[name] = torch.cat([basis[:, : places[0]], basis[:, places[0] + n :]], dim=1)
    return rest


def one_short(directions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the least direction of each layer's, but not the only one: the released code's first count for a layer."""
    return {name: found[:, : max(1, found.shape[1] - 1)].contiguous() for name, found in directions.items()}
