"""The updates of several tasks as one: put side by side, which is exact, or cut to a rank, which is smaller."""

from dataclasses import dataclass

import torch
from torch import Tensor

from keeplora.progress import Track, silent
from keeplora.subspace import linear_algebra as linalg

Factors = dict[str, tuple[Tensor, Tensor]]  # By layer `a [r, d_in]` and `b [d_out, r]`; the update is `b @ a`.


@dataclass(frozen=True)
class Cut:
    """What was lost where the updates were cut to a rank: relative errors in the Frobenius norm."""

    rank: int
    errors: dict[str, float]  # Of each layer's update.
    overall: float  # Of all updates together.

    @property
    def worst(self) -> str:
        """The layer that lost most."""
        return max(self.errors, key=lambda name: self.errors[name])


def summed(adapters: list[Factors]) -> Factors:
    """Return factors `a [n, d_in]` and `b [d_out, n]` whose product is the sum of all updates of a layer, exactly."""
    sums = {}
    for name in sorted({name for factors in adapters for name in factors}):
        a, b = zip(*(factors[name] for factors in adapters if name in factors), strict=True)
        sums[name] = (torch.cat(a), torch.cat(b, dim=1))
    return sums


def cut_to(factors: Factors, rank: int, *, track: Track = silent) -> tuple[Factors, Cut]:
    """Return the best approximation of every update whose factors have a higher rank than this, and what it loses."""
    kept, errors = dict(factors), dict.fromkeys(factors, 0.0)
    lost = total = 0.0
    for name, (a, b) in track(factors.items(), f"cutting to rank {rank}", len(factors)):
        small_a, small_b, s = linalg.truncated(a.double(), b.double(), rank)
        total += float(s.square().sum())
        if len(a) > rank:
            kept[name] = (small_a.float(), small_b.float())
            lost += float(s[rank:].square().sum())
            errors[name] = float(s[rank:].norm() / s.norm()) if s.any() else 0.0
    return kept, Cut(rank, errors, (lost / total) ** 0.5 if total else 0.0)
