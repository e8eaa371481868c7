"""General pictures of shapes: colours, shapes, numbers, places, sizes, and how they stand to each other."""

import math
from collections import Counter
from dataclasses import dataclass
from random import Random

from PIL import Image

from .canvas import COLOURS, SHAPES, SIZE, Canvas, contrast, vary
from .questions import PLACES, Picture, one_of, options, place_of, plural

TOLD = ("color", "color or", "color option", "shape", "shape or", "shape option", "count", "exists", "place")
TOLD += ("place option", "at place", "list")
PLAIN = ((255, 255, 255), (245, 245, 240), (230, 235, 240))


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The part of the picture that it is in."""
        return place_of(self.x, self.y)


def background(rng: Random) -> Canvas:
    """Return a canvas: white, of one light colour, of a soft mix of colours, or dark."""
    kind = rng.random()
    if kind < 0.35:
        return Canvas(rng.choice(PLAIN))
    if kind < 0.65:
        return Canvas((rng.randint(150, 255), rng.randint(150, 255), rng.randint(150, 255)))
    if kind < 0.9:
        soft = Image.new("RGB", (3, 3))
        soft.putdata([tuple(rng.randint(130, 255) for _ in range(3)) for _ in range(9)])
        return Canvas(soft)
    return Canvas((rng.randint(0, 50), rng.randint(0, 50), rng.randint(0, 50)))


def scene(rng: Random) -> Picture:
    """Return a scene of one to six shapes."""
    canvas, things = background(rng), []
    number = rng.choice((1, 2, 2, 3, 3, 4, 5, 6))
    alike = rng.random() < 0.35
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    for _ in range(200):
        size = rng.uniform(7, 16) if number > 2 else rng.uniform(9, 26)
        x, y = rng.uniform(size + 1, SIZE - size - 1), rng.uniform(size + 1, SIZE - size - 1)
        one = Thing(
            shape if alike and rng.random() < 0.75 else rng.choice(SHAPES),
            colour if alike and rng.random() < 0.5 else rng.choice(list(COLOURS)),
            x,
            y,
            size,
        )
        apart = all(math.hypot(x - other.x, y - other.y) > size + other.size + 2 for other in things)
        if apart and contrast(canvas.colour_at(x, y), COLOURS[one.colour]) > 110:
            canvas.shape(one.shape, x, y, size, vary(rng, COLOURS[one.colour]))
            things.append(one)
        if len(things) == number:
            break
    if not things:
        return scene(rng)
    picture = Picture(canvas.finished(), key=("scene", *sorted(one.name for one in things)))
    picture.description = ", ".join(f"{one.name} {one.place}" for one in sorted(things, key=lambda one: one.x))
    picture.told = TOLD
    _ask_what(rng, picture, things)
    _ask_how_many(rng, picture, things)
    _ask_whether(rng, picture, things)
    _ask_where(rng, picture, things)
    if len(things) > 1:
        _ask_which(rng, picture, things)
    row = sorted(things, key=lambda one: one.x)
    picture.ask("list", rng.choice(("list the objects.", "list the shapes from left to right.")), _listed(row))
    return picture


def _listed(things: list[Thing]) -> str:
    return ", ".join(one.name for one in things)


def _single(things: list[Thing], attribute: str) -> list[Thing]:
    """Return the things that no other one is like in the attribute."""
    times = Counter(getattr(one, attribute) for one in things)
    return [one for one in things if times[getattr(one, attribute)] == 1]


def _ask_what(rng: Random, picture: Picture, things: list[Thing]) -> None:
    """Ask for the color of a shape that comes once, and for the shape of such a color."""
    color = ("what color is the {}?", "what is the color of the {}?", "which color does the {} have?")
    shape = ("what shape is {}?", "which shape is the {} object?", "what is the {} thing?")
    for kind, asked, given, ways, known in (
        ("color", "colour", "shape", color, list(COLOURS)),
        ("shape", "shape", "colour", shape, list(SHAPES)),
    ):
        if single := _single(things, given):
            one = rng.choice(single)
            text, answer = rng.choice(ways).format(getattr(one, given)), getattr(one, asked)
            there = [getattr(other, asked) for other in things]
            picture.ask(kind, text, answer)
            picture.ask(f"{kind} or", one_of(rng, text, answer, [*there, *rng.sample(known, 2)]), answer)
            picture.ask(f"{kind} option", *options(rng, text, answer, [*there, *rng.sample(known, 4)]))


def _ask_how_many(rng: Random, picture: Picture, things: list[Thing]) -> None:
    ways = ("how many objects are there?", "how many shapes are in the image?", "count the objects.")
    picture.ask("count", rng.choice(ways), len(things))
    shape = rng.choice(things).shape if rng.random() < 0.8 else rng.choice(SHAPES)
    number = sum(one.shape == shape for one in things)
    ways = ("how many {} are there?", "count the {}.", "how many {} are visible?")
    picture.ask("count", rng.choice(ways).format(plural(shape)), number)
    colour = rng.choice(things).colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
    number = sum(one.colour == colour for one in things)
    ways = ("how many {} objects are there?", "count the {} shapes.", "how many of the objects are {}?")
    picture.ask("count", rng.choice(ways).format(colour), number)


def _ask_whether(rng: Random, picture: Picture, things: list[Thing]) -> None:
    """Ask for what is there, or for what shares a shape or a colour with what is there: half of each."""
    one, names = rng.choice(things), {other.name for other in things}
    if rng.random() < 0.5:
        asked, answer = one.name, "yes"
    else:
        near = [f"{one.colour} {shape}" for shape in SHAPES] + [f"{colour} {one.shape}" for colour in COLOURS]
        mixed = [f"{a.colour} {b.shape}" for a in things for b in things]
        candidates = [name for name in mixed if name not in names] if rng.random() < 0.5 else []
        asked, answer = rng.choice(candidates or [name for name in near if name not in names]), "no"
    ways = ("is there a {}?", "is a {} visible in the image?", "does the image show a {}?")
    picture.ask("exists", rng.choice(ways).format(asked), answer)
    shapes = {other.shape for other in things}
    asked = one.shape if rng.random() < 0.5 else rng.choice([shape for shape in SHAPES if shape not in shapes])
    ways = ("is there a {}?", "is there any {} in the picture?", "can you see a {}?")
    picture.ask("exists", rng.choice(ways).format(asked), "yes" if asked in shapes else "no")
    if single := _single(things, "shape"):
        one = rng.choice(single)
        asked = one.colour if rng.random() < 0.5 else rng.choice([c for c in COLOURS if c != one.colour])
        text = rng.choice(("is the {} {}?", "is the color of the {} {}?")).format(one.shape, asked)
        picture.ask("exists", text, "yes" if asked == one.colour else "no")
    kinds = sorted(shapes | set(rng.sample(SHAPES, 2)))
    first, second = rng.sample(kinds, 2)
    times = Counter(other.shape for other in things)
    if times[first] != times[second]:
        text = f"are there more {plural(first)} than {plural(second)}?"
        picture.ask("exists", text, "yes" if times[first] > times[second] else "no")


def _ask_where(rng: Random, picture: Picture, things: list[Thing]) -> None:
    single = _single(things, "name")
    if not single:
        return
    one = rng.choice(single)
    ways = ("where is the {}?", "in which part of the image is the {}?", "where is the {} located?")
    text = rng.choice(ways).format(one.name)
    picture.ask("place", text, one.place)
    picture.ask("place option", *options(rng, text, one.place, rng.sample(PLACES, 4)))
    if abs(one.x - SIZE / 2) > 8:
        ways = ("is the {} on the left or on the right?", "on which side is the {}, left or right?")
        picture.ask("side", rng.choice(ways).format(one.name), "left" if one.x < SIZE / 2 else "right")
    if abs(one.y - SIZE / 2) > 8:
        ways = ("is the {} at the top or at the bottom?", "is the {} in the upper or the lower half, top or bottom?")
        picture.ask("side", rng.choice(ways).format(one.name), "top" if one.y < SIZE / 2 else "bottom")
    alone = [one for one in things if sum(other.place == one.place for other in things) == 1]
    if alone:
        one = rng.choice(alone)
        where = "in the center" if one.place == "center" else f"at the {one.place}"
        picture.ask("at place", f"what is {where}?", one.name)
    if len(single) < 2:
        return
    one, other = rng.sample(single, 2)
    if abs(one.x - other.x) > 12:
        ways = ("is the {} left or right of the {}?", "is the {} to the left or to the right of the {}?")
        picture.ask("relation", rng.choice(ways).format(one.name, other.name), "left" if one.x < other.x else "right")
    if abs(one.y - other.y) > 12:
        text = f"is the {one.name} above or below the {other.name}?"
        picture.ask("relation", text, "above" if one.y < other.y else "below")
    if abs(one.size - other.size) > 4:
        larger = one if one.size > other.size else other
        ways = ("which is larger, the {} or the {}?", "which one is bigger, the {} or the {}?")
        picture.ask("larger", rng.choice(ways).format(one.name, other.name), larger.name)
        ways = ("is the {} larger than the {}?", "is the {} bigger than the {}?")
        picture.ask("yes/no", rng.choice(ways).format(one.name, other.name), "yes" if larger is one else "no")


def _ask_which(rng: Random, picture: Picture, things: list[Thing]) -> None:
    by_x, by_y = sorted(things, key=lambda one: one.x), sorted(things, key=lambda one: one.y)
    ends = [(by_x[0], "leftmost"), (by_x[-1], "rightmost"), (by_y[0], "highest"), (by_y[-1], "lowest")]
    one, end = rng.choice(ends)
    asked, answer = rng.choice((("object", one.name), ("shape", one.shape), ("color", one.colour)))
    text = f"what color is the {end} object?" if asked == "color" else f"what is the {end} {asked}?"
    picture.ask("end", text, answer)
    by_size = sorted(things, key=lambda other: other.size)
    if by_size[-1].size - by_size[-2].size > 3:
        ways = ("which color is the largest object?", "what is the color of the biggest object?")
        picture.ask("largest", rng.choice(ways), by_size[-1].colour)
    if by_size[1].size - by_size[0].size > 3:
        picture.ask("largest", "what color is the smallest object?", by_size[0].colour)
