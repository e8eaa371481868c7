"""The general mix that the model is pre-trained on, and the part of it that is held out to examine it."""

from random import Random

from .drawings import grid, one_drawing
from .plain import pattern, street, writing
from .questions import Picture, share_of
from .scenes import scene

SHARES = {"scene": 0.43, "street": 0.13, "drawing": 0.12, "grid": 0.09, "writing": 0.10, "pattern": 0.13}
HELD_OUT = {"scene": 5, "street": 5, "grid": 5, "writing": 10, "pattern": 5}  # One of so many contents is held out.


def picture(rng: Random, split: str) -> Picture:
    """Return a picture of the general mix for "train", or one of those held out for "test".

    Held out are contents (which shapes of which colours, which things, which number is written), and for drawings the
    validation split of `mini`.
    """
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    while True:
        made = _of_kind(rng, kind, split)
        if kind not in HELD_OUT or (share_of(made.key, HELD_OUT[kind]) == 0) == (split != "train"):
            return made


def _of_kind(rng: Random, kind: str, split: str) -> Picture:
    drawn = "train" if split == "train" else "validation"
    if kind == "drawing":
        return one_drawing(rng, drawn)
    if kind == "grid":
        return grid(rng, drawn)
    return {"scene": scene, "street": street, "writing": writing, "pattern": pattern}[kind](rng)
