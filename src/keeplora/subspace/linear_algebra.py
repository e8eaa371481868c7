"""Linear algebra of protected subspaces, in float32 or float64, whichever the caller hands in.

Shapes, everywhere in this project (weights are stored as `nn.Linear` stores them):

    weight, gradient  [d_out, d_in]
    basis             [d_in, k]      orthonormal columns: the input directions that are protected
    directions        [d_in, m]      orthonormal columns that are about to join a basis
    rows              [n, d_in]      any stack of vectors on the input side
    gram              [d_in, d_in]   sum of outer products of input rows
    a, b              [r, d_in], [d_out, r]   LoRA factors; the update is `scaling * b @ a`
"""

from typing import cast

import torch
from torch import Tensor

OVERSAMPLING = 4  # The randomised SVD looks at this many times the wanted rank.

POWER_ITERATIONS = 4

NOTHING_LEFT = 1e-3  # A unit row that keeps at most this length after a projection is inside the subspace.

NEARLY_ORTHONORMAL = 0.5
"""Rows whose products differ from those of orthonormal ones by at most this, in the Frobenius norm, take the Cholesky
factor of the products in place of QR: their condition number is below 2, so that twice is as accurate, and faster."""

COMPLEMENT_FROM = 0.2
"""Share of the dimensions from which on a basis is worth the change to coordinates of its complement."""

EXACT_BELOW = 256  # Matrices whose smaller side is at most this take the exact SVD: it is nearly as fast there.


def energy_rank(energies: Tensor, share: float, *, covered: float = 0.0, total: float | None = None) -> int:
    """Return the smallest `n <= len(energies)` with `covered + energies[:n].sum() >= share * total`, largest first."""
    reached = covered + energies.cpu().double().clamp_min(0).cumsum(0)
    total = float(reached[-1]) if total is None else total
    if total <= 0 or covered >= share * total:
        return 0
    return min(int((reached < share * total).sum()) + 1, len(energies))


def top_directions(gram: Tensor, share: float, *, covered: float = 0.0, total: float | None = None) -> Tensor:
    """Return the fewest leading eigenvectors of a gram that reach a share of the energy, `[d_in, m]`."""
    energies, directions = spectrum(gram)
    return directions[:, : energy_rank(energies, share, covered=covered, total=total)]


def principal_directions(weight: Tensor, share: float) -> Tensor:
    """Return the fewest leading right singular vectors of a weight that reach a share of its energy, `[d_in, m]`."""
    d_out, d_in = weight.shape
    if d_out >= d_in:
        return top_directions(weight.T @ weight, share)
    rows = top_directions(weight @ weight.T, share).T @ weight  # The smaller eigenproblem: left vectors give the right.
    return _orthonormalised(rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)).T


def residual_directions(gram: Tensor, basis: Tensor, share: float) -> Tensor:
    """Return the fewest directions `[d_in, m]` outside a basis that bring the energy it covers to a share of the total.

    They are the leading eigenvectors of `residual_gram`, orthonormal and orthogonal to the basis. Where a basis takes a
    good part of the space, Householder reflections lead to the smaller eigenproblem of its complement and back.
    """
    _require_full_precision(gram)
    d_in, k = basis.shape
    total = float(gram.trace())
    if k < COMPLEMENT_FROM * d_in:
        residual = residual_gram(gram, basis)
        found = top_directions(residual, share, covered=total - float(residual.trace()), total=total)
        return extend(basis, found)[:, k:]
    reflectors, scales = torch.geqrf(basis)
    half = torch.ormqr(reflectors, scales, gram, transpose=True)[k:]
    residual = torch.ormqr(reflectors, scales, half, left=False)[:, k:]
    inside = top_directions(residual, share, covered=total - float(residual.trace()), total=total)
    return torch.ormqr(reflectors, scales, torch.cat([inside.new_zeros(k, inside.shape[1]), inside]))


def spectrum(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[d_in]` of a gram, largest first, and its eigenvectors `[d_in, d_in]` in that order."""
    _require_full_precision(gram)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)  # Reads the lower half: a gram is symmetric.
    return eigenvalues.flip(0), eigenvectors.flip(1)


def project_onto(rows: Tensor, basis: Tensor) -> Tensor:
    """Keep of every row only its part inside the span of a basis, `[n, d_in]`."""
    return (rows @ basis) @ basis.T


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Remove from every row its part inside the span of a basis, `[n, d_in]`."""
    return torch.sub(rows, project_onto(rows, basis))


def residual_gram(gram: Tensor, basis: Tensor) -> Tensor:
    """Return the gram of the inputs after the basis was projected out of each, `[d_in, d_in]`."""
    inside = gram @ basis
    half = torch.sub(inside, basis @ (basis.T @ inside), alpha=0.5)
    crossing = half @ basis.T
    return gram - crossing - crossing.T


def orthonormal_rows(rows: Tensor, basis: Tensor) -> Tensor:
    """Turn unit rows into orthonormal ones that are orthogonal to a basis, `[<= n, d_in]`, spanning what is left."""
    _require_full_precision(rows)
    for _ in range(2):  # Rows that were nearly inside the basis lose what rounding left of it.
        rows = _orthonormalised(project_out(rows, basis))
    return rows.contiguous()


def _orthonormalised(rows: Tensor) -> Tensor:
    """Turn rows of at most unit length into orthonormal ones that span what they do."""
    products = rows @ rows.T
    if torch.linalg.matrix_norm(products - torch.eye(len(rows)).to(rows)) <= NEARLY_ORTHONORMAL:
        triangle = torch.linalg.cholesky(products)
        return cast(Tensor, torch.linalg.solve_triangular(triangle, rows, upper=False))
    q, triangle = torch.linalg.qr(rows.T)
    if (triangle.diagonal().abs() > NOTHING_LEFT).all():
        return cast(Tensor, q.T)
    # QR gives a row with nothing left a random direction, and takes that out of the rows after it.
    _, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return cast(Tensor, vh[s > NOTHING_LEFT])


def extend(basis: Tensor, directions: Tensor) -> Tensor:
    """Append directions to a basis and re-orthonormalise, `[d_in, k + m]`.

    The first `k` columns stay as they are, bit by bit, so that a basis is the concatenation of what each task added.
    """
    if directions.shape[1] == 0 or basis.shape[0] == basis.shape[1]:
        return basis
    return torch.cat([basis, orthonormal_rows(directions.T, basis).T], dim=1)


def low_rank(matrix: Tensor, r: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rank-r factors `(u [m, r], s [r], vh [r, n])`, so that `u * s @ vh` is close to `matrix`.

    Small matrices take the exact SVD; large ones the seeded randomised SVD of Halko, Martinsson and Tropp (2011).
    """
    _require_full_precision(matrix)
    smaller = min(matrix.shape)
    if not 1 <= r <= smaller:
        raise ValueError(f"rank {r} is not between 1 and {smaller}, the smaller side of {tuple(matrix.shape)}")
    if smaller <= max(EXACT_BELOW, OVERSAMPLING * r):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            if matrix.is_cuda:  # Only what draws is seeded, and restored.
                torch.cuda.default_generators[matrix.device.index].manual_seed(seed)
            else:
                (torch.default_generator if matrix.is_cpu else torch).manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=OVERSAMPLING * r, niter=POWER_ITERATIONS)
        vh = v.T
    return u[:, :r].contiguous(), s[:r].contiguous(), vh[:r].contiguous()


def truncated(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best rank-r factors `a [m, d_in]` and `b [d_out, m]` of a product `b @ a`, and its singular values.

    The factors share the values evenly; those from `m <= r` on are lost. The product is never formed: QR of both
    factors leaves a core no larger than their rank, whose SVD is that of the product.
    """
    _require_full_precision(a)
    q_in, core_in = torch.linalg.qr(a.T)
    q_out, core_out = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
    root = s[:r].sqrt()
    return root.unsqueeze(1) * (vh[:r] @ q_in.T), (q_out @ u[:, :r]) * root, s


def orthonormality_error(basis: Tensor) -> float:
    """Return `max |basis^T basis - I|`, 0 for an empty basis."""
    error = basis.T @ basis
    error.diagonal().sub_(1)
    return float(error.abs().max()) if error.numel() else 0.0


def share_of_norm(part: Tensor, whole: Tensor) -> float:
    """Return `||part||_F / ||whole||_F`, 0 for nothing of nothing."""
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0


def _require_full_precision(matrix: Tensor) -> None:
    assert matrix.dtype in (torch.float32, torch.float64), f"{matrix.dtype} is too coarse for linear algebra"
