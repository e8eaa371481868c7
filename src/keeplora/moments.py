"""What the rows that reach a layer add up to: their second moment, one way or the other."""

from typing import ClassVar

import torch
from torch import Tensor


class SecondMoment:
    """Sum of outer products of all rows."""

    takes_parts: ClassVar[bool] = True
    """Whether it is the same however the rows are cut into batches."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, inputs: Tensor, real: Tensor | None) -> None:
        """Add the rows of inputs `[..., d_in]`, or of those that are real."""
        rows = (inputs.reshape(-1, inputs.shape[-1]) if real is None else inputs[real]).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.T, rows)

    def gram(self) -> Tensor:
        """Return the gram `[d_in, d_in]`, in float32."""
        assert self.total is not None
        return self.total


class BatchMean:
    """Inputs averaged over batches by their place in the batch, as the released code does; then outer products."""

    takes_parts: ClassVar[bool] = False

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.num_batches = 0

    def add(self, inputs: Tensor, real: Tensor | None) -> None:
        """Add the inputs `[n, ..., d_in]` of a batch; what is not real counts as zero."""
        inputs = inputs.float() if real is None else inputs.float() * real.unsqueeze(-1)
        if self.total is None:
            self.total = torch.zeros_like(inputs)
        if inputs.shape == self.total.shape:
            self.total += inputs
            self.num_batches += 1

    def gram(self) -> Tensor:
        """Return the gram `[d_in, d_in]`, in float32."""
        assert self.total is not None
        rows = self.total.reshape(-1, self.total.shape[-1]) / self.num_batches
        return rows.T @ rows


Statistic = SecondMoment | BatchMean

STATISTICS: dict[str, type[Statistic]] = {
    "second_moment": SecondMoment,
    "batch_mean": BatchMean,
}
