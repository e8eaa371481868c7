"""Results of several values a layer, as plain tensors by name: the form in which they are written and read."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class NamedTensors:
    """Base of results whose every field holds, by the layer's name, a tensor or a number."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Return every value by its field and name; a number is a tensor without dimensions, in float64."""
        return {
            f"{field.name}/{name}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for field in fields(self)
            for name, value in getattr(self, field.name).items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Return the result that `to_tensors` was called on."""
        values: dict[str, dict[str, Tensor | float]] = {field.name: {} for field in fields(cls)}
        for key, value in tensors.items():
            field, _, name = key.partition("/")
            is_number = value.dim() == 0 and value.dtype == torch.float64
            values[field][name] = value.item() if is_number else value
        return cls(**values)
