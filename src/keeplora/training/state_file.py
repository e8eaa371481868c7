"""State as one safetensors file: tensors by number, everything around them as JSON in its metadata. No pickle.

A state is nested dicts, lists, tuples, numbers, strings, None and tensors, as the `state_dict` of torch's optimisers.
"""

import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

State = Any


def pack(state: State) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file that holds a state; the tensors are not copied."""
    tensors: dict[str, Tensor] = {}
    return tensors, {"state": json.dumps(_strip(state, tensors))}


def from_bytes(content: bytes) -> State:
    """Return the state of a file that `pack` was written to, its tensors on the CPU, or raise a `ValueError`."""
    try:
        tensors = aligned(load(content))
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return _fill(json.loads(header["__metadata__"]["state"]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"this is no state of a run: {error}") from None


def aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that lie anywhere in a file's bytes to where torch would put them: sums round differently there."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _strip(value: State, tensors: dict[str, Tensor]) -> State:
    """Replace every tensor by its number, and what JSON does not know by a tagged list."""
    if isinstance(value, np.ndarray):
        assert value.dtype.kind in "iub", f"an array of {value.dtype} cannot be kept"
        whole = torch.from_numpy(value.astype(np.int64))  # numpy's generator has unsigned numbers, which torch lacks
        return {"kind": "array", "items": _strip(whole, tensors), "dtype": str(value.dtype)}
    if isinstance(value, Tensor):
        number = str(len(tensors))
        is_shared = value.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in tensors.values()}
        tensors[number] = value.detach().clone() if is_shared else value.detach()
        return {"kind": "tensor", "items": number}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[_strip(key, tensors), _strip(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_strip(item, tensors) for item in value]
        return {"kind": "tuple" if isinstance(value, tuple) else "list", "items": items}
    assert value is None or isinstance(value, str | bool | int | float), f"{type(value)} cannot be kept"
    return value


def _fill(value: State, tensors: dict[str, Tensor]) -> State:
    """Put every tensor back in its place."""
    if not isinstance(value, dict):
        return value
    kind, items = value["kind"], value["items"]
    if kind == "tensor":
        return tensors[items]
    if kind == "array":
        whole = _fill(items, tensors)
        if not isinstance(whole, Tensor) or np.dtype(value["dtype"]).kind not in "iub":
            raise ValueError("an array of it is damaged")
        return whole.numpy().astype(value["dtype"])
    if kind == "dict":
        return {_fill(key, tensors): _fill(item, tensors) for key, item in items}
    filled = [_fill(item, tensors) for item in items]
    return tuple(filled) if kind == "tuple" else filled


def capture_random(generators: Iterable[torch.Generator] = ()) -> State:
    """Return the state of every global random generator, the current GPU's included, and of those given."""
    return {
        "python": random.getstate(),
        "numpy": list(np.random.get_state()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random(state: State, generators: Iterable[torch.Generator] | None = None) -> None:
    """Give random generators the state that `capture_random` found: the global ones, and all of those given, if any."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if generators is not None:
        for generator, captured in zip(generators, state["generators"], strict=True):
            generator.set_state(captured)
