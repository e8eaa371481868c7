"""General pictures: writing, patterns, arrows, lines, blocks, and a street seen from the side."""

import math
from random import Random

from .canvas import COLOURS, FONTS, SIZE, Canvas, contrast, vary
from .questions import Picture, article, one_of, options, place_of, plural
from .scenes import background

READ = [
    "red",
    "blue",
    "cat",
    "dog",
    "car",
    "bus",
    "sun",
    "map",
    "tree",
    "road",
    "fish",
    "bird",
    "milk",
    "book",
    "ring",
    "star",
    "yes",
    "no",
    "stop",
    "go",
    "left",
    "right",
    "up",
    "down",
    "one",
    "two",
    "six",
    "ten",
    "hot",
    "cold",
    "day",
    "cell",
    "lake",
    "farm",
    "bar",
    "line",
    "sum",
    "high",
    "low",
    "max",
    "min",
]
INK = [name for name in COLOURS if name not in ("white", "yellow", "cyan", "pink")]
BRIGHT = [name for name in COLOURS if name != "white"]
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def _ink(rng: Random, canvas: Canvas, names: list[str]) -> str:
    """Return the name of a colour that is seen on the canvas."""
    ground = canvas.colour_at(SIZE / 2, SIZE / 2)
    return rng.choice([name for name in names if contrast(ground, COLOURS[name]) > 150] or ["black", "white"])


def writing(rng: Random) -> Picture:
    """Return a picture of a number or a word, sometimes of two in a row."""
    canvas, picture = background(rng), Picture(None)
    colour = _ink(rng, canvas, list(COLOURS))
    face = rng.choice(FONTS)
    if rng.random() < 0.35:
        return _rows(rng, canvas, colour, face)
    kind = rng.random()
    number = str(rng.randint(0, 9)) if kind < 0.3 else str(rng.randint(10, 99))
    text = number if kind < 0.65 else rng.choice(READ)
    sizes = {
        1: rng.randint(14, 70),
        2: rng.randint(13, 52),
        3: rng.randint(14, 36),
        4: rng.randint(14, 28),
        5: rng.randint(14, 24),
    }
    size = sizes[len(text)]
    wide, high = canvas.text_size(text, size=size, face=face)
    x = rng.uniform(wide / 2 + 1, max(wide / 2 + 1, SIZE - wide / 2 - 1))
    y = rng.uniform(high / 2 + 2, max(high / 2 + 2, SIZE - high / 2 - 2))
    canvas.text(x, y, text, vary(rng, COLOURS[colour]), size=size, face=face)
    picture.image, picture.key = canvas.finished(), ("writing", text)
    what = "number" if text[0].isdigit() else "word"
    ways = (f"what {what} is written?", f"which {what} is this?", "what does the text say?", f"read the {what}.")
    picture.ask("read", rng.choice(ways), text)
    picture.ask("read", rng.choice(ways), text)
    others = [str(rng.randint(0, 99)) for _ in range(5)] if what == "number" else rng.sample(READ, 5)
    picture.ask("read option", *options(rng, rng.choice(ways[:2]), text, others))
    picture.ask("color", rng.choice(("what color is the text?", "which color is the writing?")), colour)
    picture.ask("color or", one_of(rng, "what color is the text?", colour, rng.sample(list(COLOURS), 3)), colour)
    picture.ask("name or", rng.choice(("is this a number or a word?", "number or word?")), what)
    asked = text if rng.random() < 0.5 else rng.choice(others)
    picture.ask("yes/no", f"is the {what} {asked}?", "yes" if asked == text else "no")
    return picture


def _rows(rng: Random, canvas: Canvas, colour: str, face: str) -> Picture:
    """Return a picture of letters and numbers, two or three rows of them."""
    number = rng.choice((2, 3))
    letters = rng.sample("abcdef", number)
    values = [str(value) for value in rng.sample(range(1, 100), number)]
    size, ink = rng.randint(13, 20), vary(rng, COLOURS[colour])
    left, right = rng.uniform(14, 34), rng.uniform(58, 80)
    for i in range(number):
        y = SIZE * (i + 0.5) / number + rng.uniform(-4, 4)
        canvas.text(left, y, letters[i].upper(), ink, size=size, face=face)
        canvas.text(right, y, values[i], ink, size=size, face=face)
    picture = Picture(canvas.finished(), key=("rows", *letters, *values))
    i, j = rng.sample(range(number), 2)
    ways = ("which number is beside {}?", "what is the number of {}?", "what is the value of {}?")
    picture.ask("read", rng.choice(ways).format(letters[i]), values[i])
    picture.ask("read", f"which letter is beside {values[j]}?", letters[j])
    picture.ask("count", "how many rows are there?", number)
    ordered = sorted(range(number), key=lambda k: int(values[k]))
    picture.ask("larger", "which letter has the highest number?", letters[ordered[-1]])
    picture.ask("read", f"which number is at the {'top' if i < j else 'bottom'}?", values[0 if i < j else -1])
    asked = values[i] if rng.random() < 0.5 else values[j]
    picture.ask("yes/no", f"is {asked} beside {letters[i]}?", "yes" if asked == values[i] else "no")
    picture.ask("list", "list the numbers.", ", ".join(values))
    return picture


def pattern(rng: Random) -> Picture:
    """Return a picture of an arrow, a line, a pattern that repeats, or blocks of unequal height."""
    return rng.choice((_arrow, _line, _repeated, _blocks, _blocks))(rng)


def _arrow(rng: Random) -> Picture:
    canvas = background(rng)
    colour, way = _ink(rng, canvas, BRIGHT), rng.choice(list(DIRECTIONS))
    (u, v), reach, width = DIRECTIONS[way], rng.uniform(14, 36), rng.uniform(3, 8)
    x, y = rng.uniform(reach + 6, SIZE - reach - 6), rng.uniform(reach + 6, SIZE - reach - 6)
    ink, head = vary(rng, COLOURS[colour]), width + 6
    tip, neck = (x + u * reach, y + v * reach), (x + u * (reach - head), y + v * (reach - head))
    canvas.line([(x - u * reach, y - v * reach), neck], ink, width)
    canvas.polygon([tip, (neck[0] - v * head, neck[1] - u * head), (neck[0] + v * head, neck[1] + u * head)], ink)
    picture = Picture(canvas.finished(), key=("arrow", colour, way, place_of(x, y)))
    text = rng.choice(("which direction does the arrow point?", "in which direction is the arrow pointing?"))
    picture.ask("direction", text, way)
    picture.ask("direction option", *options(rng, text, way, list(DIRECTIONS)))
    picture.ask("color", "what color is the arrow?", colour)
    picture.ask("place", "where is the arrow?", place_of(x, y))
    asked = way if rng.random() < 0.5 else rng.choice([other for other in DIRECTIONS if other != way])
    picture.ask("yes/no", f"does the arrow point {asked}?", "yes" if asked == way else "no")
    return picture


def _line(rng: Random) -> Picture:
    canvas = background(rng)
    colour, way = _ink(rng, canvas, BRIGHT), rng.choice(("horizontal", "vertical", "rising", "falling"))
    ink, width, middle = vary(rng, COLOURS[colour]), rng.uniform(2, 8), rng.uniform(18, SIZE - 18)
    if way in ("horizontal", "vertical"):
        bent = rng.random() < 0.4
        run = [(t, middle + (6 * math.sin(t / 11) if bent else 0)) for t in range(4, SIZE - 3, 4)]
        canvas.line(run if way == "horizontal" else [(b, a) for a, b in run], ink, width)
    else:
        low, high = rng.uniform(60, 88), rng.uniform(8, 36)
        left, right = (low, high) if way == "rising" else (high, low)
        steps = [(8 + 80 * t / 7, left + (right - left) * t / 7 + rng.uniform(-3, 3)) for t in range(8)]
        canvas.line(steps, ink, width)
    picture = Picture(canvas.finished(), key=("line", colour, way, int(middle / 12)))
    ways = ("what is the direction of the line?", "how does the line run?", "which way does the line go?")
    text, known = rng.choice(ways), ["horizontal", "vertical", "rising", "falling"]
    picture.ask("direction", text, way)
    picture.ask("direction option", *options(rng, text, way, known))
    other = rng.choice([one for one in known if one != way])
    first, second = rng.sample((way, other), 2)
    picture.ask("direction or", f"is the line {first} or {second}?", way)
    picture.ask("color", "what color is the line?", colour)
    return picture


def _repeated(rng: Random) -> Picture:
    canvas = background(rng)
    kind, colour, way = rng.choice(("stripes", "dots", "grid")), _ink(rng, canvas, BRIGHT), rng.random() < 0.5
    ink, step = vary(rng, COLOURS[colour]), rng.randint(10, 22)
    direction = "horizontal" if way else "vertical"
    for i in range(step // 2, SIZE, step):
        if kind == "stripes":
            canvas.box(*((0, i, SIZE, i + step / 2) if way else (i, 0, i + step / 2, SIZE)), ink)
        elif kind == "grid":
            canvas.line([(0, i), (SIZE, i)], ink, 2)
            canvas.line([(i, 0), (i, SIZE)], ink, 2)
        else:
            for j in range(step // 2, SIZE, step):
                canvas.disc(i, j, step / 4, ink)
    picture = Picture(canvas.finished(), key=(kind, colour, direction, step))
    text = rng.choice(("what pattern is this?", "which pattern is shown?"))
    picture.ask("name", text, kind)
    picture.ask("name option", *options(rng, text, kind, ["stripes", "dots", "grid", "arrow", "line"]))
    picture.ask("color", f"what color {'is the grid' if kind == 'grid' else 'are the ' + kind}?", colour)
    if kind == "stripes":
        text = rng.choice(("are the stripes horizontal or vertical?", "horizontal or vertical stripes?"))
        picture.ask("direction or", text, direction)
    return picture


def _blocks(rng: Random) -> Picture:
    canvas, number = background(rng), rng.choice((2, 3, 3, 4))
    ground = canvas.colour_at(SIZE / 2, SIZE / 2)
    seen = [name for name in COLOURS if contrast(ground, COLOURS[name]) > 120]
    colours, heights = rng.sample(seen, number), rng.sample(range(14, 86, 8), number)
    wide, base = 84 / number, rng.uniform(86, 93)
    for i, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        x = 6 + i * wide + rng.uniform(0, 3)
        canvas.box(x, base - height, x + wide * rng.uniform(0.45, 0.75), base, vary(rng, COLOURS[colour]))
    high, low = colours[heights.index(max(heights))], colours[heights.index(min(heights))]
    picture = Picture(canvas.finished(), key=("blocks", *colours, *heights))
    word = rng.choice(("block", "bar"))
    text = rng.choice(("what color is the tallest {}?", "which {} is the tallest?", "which {} is the highest?"))
    picture.ask("largest", text.format(word), high)
    picture.ask("largest", rng.choice(("what color is the lowest {}?", "which {} is the lowest?")).format(word), low)
    picture.ask("largest option", *options(rng, f"which {word} is the tallest?", high, colours))
    picture.ask("count", f"how many {word}s are there?", number)
    i, j = rng.sample(range(number), 2)
    text = rng.choice(("is the {0} {2} taller than the {1} {2}?", "is the {0} {2} higher than the {1} {2}?"))
    answer = "yes" if heights[i] > heights[j] else "no"
    picture.ask("yes/no", text.format(colours[i], colours[j], word), answer)
    text = f"is the {colours[i]} {word} left or right of the {colours[j]} {word}?"
    picture.ask("relation", text, "left" if i < j else "right")
    numbers = ("first", "second", "third", "fourth")
    picture.ask("color", f"what color is the {numbers[i]} {word}?", colours[i])
    picture.ask("list", f"list the {word}s from left to right.", ", ".join(colours))
    return picture


def street(rng: Random) -> Picture:
    """Return houses, trees, cars, people and more on a meadow or a street, seen from the side."""
    night, horizon = rng.random() < 0.2, rng.uniform(30, 60)
    canvas = Canvas((25, 30, 60) if night else vary(rng, (170, 210, 245)))
    canvas.box(0, horizon, SIZE, SIZE, vary(rng, rng.choice(((110, 160, 90), (150, 150, 150), (205, 185, 130)))))
    kinds = [rng.choice(list(THINGS)) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
    slots = rng.sample(range(5), len(kinds))
    things: list[tuple[str, str, float, float]] = []
    for kind, slot in zip(kinds, slots, strict=True):
        colour = rng.choice(("red", "blue", "yellow", "purple", "white", "black", "orange", "brown"))
        x, y, size = 12 + slot * 18 + rng.uniform(-2, 2), rng.uniform(horizon + 4, 88), rng.uniform(7, 10)
        y = rng.uniform(10, 20) if kind in SKY else y
        THINGS[kind](canvas, x, y, size, vary(rng, COLOURS[colour], 10))
        things.append((kind, colour, x, y - size))
    picture = Picture(canvas.finished(), key=("street", *sorted(kinds), night))
    _ask_street(rng, picture, things)
    picture.ask("name or", rng.choice(("is it day or night?", "day or night?")), "night" if night else "day")
    return picture


def _ask_street(rng: Random, picture: Picture, things: list[tuple[str, str, float, float]]) -> None:
    kinds = [kind for kind, *_ in things]
    single = [one for one in things if kinds.count(one[0]) == 1]
    if single:
        kind, colour, x, y = rng.choice(single)
        if kind in PAINTED:
            text = rng.choice(("what color is the {}?", "what is the color of the {}?")).format(kind)
            picture.ask("color", text, colour)
            there = [*(other for _, other, *_ in things), *rng.sample(list(COLOURS), 3)]
            picture.ask("color option", *options(rng, text, colour, there))
        picture.ask("place", f"where is the {kind}?", place_of(x, y))
        if abs(x - SIZE / 2) > 9:
            side = "left" if x < SIZE / 2 else "right"
            picture.ask("side", f"is the {kind} on the left or on the right?", side)
    if len(single) > 1:
        (first, _, x, _), (second, _, other, _) = rng.sample(single, 2)
        picture.ask("relation", f"is the {first} left or right of the {second}?", "left" if x < other else "right")
    asked = rng.choice(kinds)
    text = rng.choice(("how many {} are there?", "count the {}.")).format(plural(asked))
    picture.ask("count", text, kinds.count(asked))
    asked = rng.choice(kinds) if rng.random() < 0.5 else rng.choice([kind for kind in THINGS if kind not in kinds])
    text = rng.choice(("is there {}?", "can you see {}?")).format(article(asked))
    picture.ask("yes/no", text, "yes" if asked in kinds else "no")
    row = sorted(things, key=lambda one: one[2])
    picture.ask("list", "list the objects from left to right.", ", ".join(kind for kind, *_ in row))


def _house(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.box(x - size, y - size, x + size, y, colour)
    canvas.polygon([(x - size * 1.2, y - size), (x + size * 1.2, y - size), (x, y - size * 2)], (110, 60, 50))
    canvas.box(x - size * 0.2, y - size * 0.6, x + size * 0.2, y, (70, 50, 40))


def _tree(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.box(x - size * 0.2, y - size, x + size * 0.2, y, (110, 75, 45))
    canvas.disc(x, y - size * 1.4, size * 0.85, (45, 120, 50))


def _car(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.box(x - size * 0.6, y - size * 1.2, x + size * 0.6, y - size * 0.6, colour)
    canvas.box(x - size * 0.45, y - size * 1.1, x + size * 0.45, y - size * 0.7, (150, 190, 210))
    canvas.box(x - size, y - size * 0.75, x + size, y - size * 0.2, colour)
    for side in (-0.55, 0.55):
        canvas.disc(x + side * size, y - size * 0.2, size * 0.25, (15, 15, 15))


def _person(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.disc(x, y - size * 1.6, size * 0.3, (235, 190, 160))
    canvas.box(x - size * 0.35, y - size * 1.3, x + size * 0.35, y - size * 0.5, colour)
    for side in (-0.2, 0.2):
        canvas.line([(x + side * size, y - size * 0.5), (x + side * size, y)], (30, 30, 40), 2)


def _sun(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.disc(x, y, size, (250, 215, 60))


def _cloud(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    for side, rise in ((-0.6, 0.0), (0.0, -0.35), (0.6, 0.0)):
        canvas.disc(x + side * size, y + rise * size, size * 0.6, (245, 245, 250))


def _lake(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.oval(x - size * 1.2, y - size * 0.8, x + size * 1.2, y + size * 0.2, (50, 105, 170))


def _sign(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    canvas.box(x - 1, y - size * 1.5, x + 1, y, (90, 90, 90))
    canvas.box(x - size * 0.7, y - size * 2.2, x + size * 0.7, y - size * 1.2, colour)


THINGS = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "person": _person,
    "sun": _sun,
    "cloud": _cloud,
    "lake": _lake,
    "sign": _sign,
}
SKY = ("sun", "cloud")
PAINTED = ("house", "car", "person", "sign")
