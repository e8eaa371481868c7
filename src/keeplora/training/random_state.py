"""Random generators: captured, so that a resumed run draws what an uninterrupted one would have drawn."""

import random
from collections.abc import Iterable

import numpy as np
import torch

from keeplora.training.state_file import State


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
