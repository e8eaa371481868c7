"""What the statistics of a model on a task have in common."""

import math

from torch import Tensor

from keeplora.errors import LearningError


def require_finite(tensor: Tensor, message: str) -> None:
    """Raise a `LearningError` with this message unless every entry of a tensor is a finite number.

    Looks at the extremes, which are NaN if any entry is: a mask would take more memory than the tensor.
    """
    if tensor.numel() > 0 and not all(math.isfinite(float(extreme)) for extreme in tensor.detach().aminmax()):
        raise LearningError(message)
