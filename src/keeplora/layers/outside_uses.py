"""Uses of a weight past its layer: what a loss takes from a weight otherwise than through its layer, no hook sees."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keeplora.layers.module_state import is_compiled

HARMLESS = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
"""What of a weight leads to no gradient."""


@contextmanager
def require_no_outside_uses(
    model: nn.Module, layers: Iterable[str], calls: Mapping[str, int], task: str
) -> Iterator[None]:
    """Check that what runs inside uses weights of plain, not compiled, linear layers only as often as `calls` says."""
    plain = [name for name in layers if type(model.get_submodule(name)) is nn.Linear]
    weights: dict[int, list[str]] = {}
    for name in plain:
        weights.setdefault(id(model.get_parameter(f"{name}.weight")), []).append(name)
    if any(map(is_compiled, model.modules())):
        yield
        return
    with _Counting(weights) as found:
        yield
    for weight, names in weights.items():
        if found.uses[weight] > sum(calls[name] for name in names):
            raise ValueError(
                f"task {task!r}: its loss uses the weight of layer {names[0]!r} past the layer, and no statistic would"
                " see that part of the gradient; take it out of the loss that the method is given"
            )


class _Counting(TorchFunctionMode):
    """Counts the operations, with a gradient to come, that get one of some tensors, by the id of each."""

    def __init__(self, wanted: Mapping[int, object]) -> None:
        super().__init__()
        self.wanted = wanted
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and isinstance(result, Tensor) and func not in HARMLESS:
            given = [*args, *(kwargs or {}).values()]
            flat = [one for each in given for one in (each if isinstance(each, list | tuple) else [each])]
            self.uses.update(id(one) for one in flat if id(one) in self.wanted)
        return result
