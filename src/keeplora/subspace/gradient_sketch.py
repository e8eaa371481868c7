"""A gradient that is never formed: a two-sided random sketch of the sum of outer products that it is.

Two random maps, drawn once from a seed, shrink the gradient `deltas.T @ inputs` of a linear layer from either side
while the rows pass by; afterwards the two small pictures give its leading directions (the one-pass algorithm of Tropp,
Yurtsever, Udell and Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM J. Matrix Anal.
Appl. 2017). Sketches are linear: those of several processes add up to the sketch of all.
"""

import math

import torch
from torch import Tensor

from keeplora.subspace import linear_algebra as linalg

RANGE, CORANGE = 8, 16
"""Width of the two pictures, in multiples of the wanted rank: the wider, the smaller the error, and the more memory."""

NOISE = 1e-5  # Singular values of a picture below this share of the largest are rounding (float32).


class GradientSketch:
    """The sketch of one layer's gradient."""

    def __init__(self, d_out: int, basis: Tensor, rank: int, *, seed: int) -> None:
        """Draw the maps, by one seed in all processes; `basis` is projected out, and `rank` directions are wanted."""
        generator, d_in = torch.Generator().manual_seed(seed), len(basis)
        k, m = (min(width * rank, d_out, d_in) for width in (RANGE, CORANGE))
        self.basis = basis
        right = torch.randn(k, d_in, generator=generator).to(basis)
        self.right = linalg.project_out(right, basis).T.contiguous()
        self.left = torch.randn(m, d_out, generator=generator).to(basis)
        self.range = basis.new_zeros(d_out, k)
        self.corange = basis.new_zeros(m, d_in)
        self.sums = (self.range, self.corange)
        """What several processes have to add up, in place."""

    def add(self, inputs: Tensor, output_gradients: Tensor, weight: float = 1.0) -> None:
        """Add `weight * output_gradients.T @ inputs`, for rows `[n, d_in]` and `[n, d_out]` of any floating type."""
        deltas, inputs = output_gradients.float(), inputs.float()
        self.range.addmm_(deltas.T, inputs @ self.right, alpha=weight)
        self.corange.addmm_(self.left @ deltas.T, inputs, alpha=weight)

    @property
    def norm(self) -> float:
        """An estimate of the Frobenius norm of the whole gradient."""
        return float(self.corange.norm()) / math.sqrt(len(self.left))

    @property
    def surviving_share(self) -> float:
        """An estimate of the share of that norm that projecting the basis out leaves."""
        return linalg.share_of_norm(linalg.project_out(self.corange, self.basis), self.corange)

    def top(self, rank: int) -> tuple[Tensor, Tensor]:
        """Approximate the leading singular values `[n]` and right singular vectors `[n, d_in]` left, `n <= rank`."""
        u, sizes, _ = torch.linalg.svd(self.range, full_matrices=False)
        q = u[:, sizes > NOISE * sizes.max()]  # What a gradient of lower rank leaves empty holds rounding alone.
        if q.shape[1] == 0:
            return sizes[:0], self.basis.new_zeros(0, len(self.basis))
        # Least squares by QR: the library's own solver gives other last bits from one call to the next.
        seen, triangle = torch.linalg.qr(self.left @ q)
        rows = seen.T @ linalg.project_out(self.corange, self.basis)
        small = torch.linalg.solve_triangular(triangle, rows, upper=True)
        _, s, vh = torch.linalg.svd(small, full_matrices=False)
        return s[:rank], vh[:rank].contiguous()
