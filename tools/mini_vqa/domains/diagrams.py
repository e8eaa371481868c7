"""School diagrams, all asked with options: angles, circuits, magnets, gears, states of matter, levers."""

import math
from collections.abc import Callable
from random import Random

from mini_vqa.canvas import COLOURS, Canvas, Colour, vary
from mini_vqa.questions import Picture, options

PAPER, INK = (252, 250, 240), (30, 30, 60)
NUMBERS = ("1", "2", "3", "4")


def diagram(rng: Random) -> Picture:
    """Return one diagram with its questions."""
    canvas = Canvas(PAPER)
    picture = Picture(None)
    for kind, text, right, wrong in rng.choice(DRAWN)(rng, canvas, picture):
        picture.ask(kind, *options(rng, text, right, list(wrong), 4))
    picture.image = canvas.finished()
    return picture


Asked = list[tuple[str, str, str, tuple[str, ...]]]


def _angle(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    kind = rng.choice(("acute", "right", "obtuse"))
    degrees = {"acute": rng.uniform(25, 60), "right": 90, "obtuse": rng.uniform(120, 160)}[kind]
    turn, x, y = rng.uniform(0, 2 * math.pi), 48 + rng.uniform(-6, 6), 48 + rng.uniform(-6, 6)
    colour = rng.choice(("red", "blue", "green", "purple", "black"))
    ends = [(x + 34 * math.cos(a), y + 34 * math.sin(a)) for a in (turn, turn + math.radians(degrees))]
    canvas.line([ends[0], (x, y), ends[1]], vary(rng, COLOURS[colour], 10), 3)
    picture.key = ("angle", kind, int(turn * 2), colour)
    return [
        ("angle", "which angle is drawn?", kind, ("acute", "right", "obtuse", "flat")),
        ("color", "what color are the lines?", colour, ("red", "blue", "green", "purple", "black")),
    ]


def _circuit(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    closed, lamps = rng.random() < 0.5, rng.randint(1, 3)
    x, y = rng.uniform(-5, 5), rng.uniform(-5, 5)
    left, top, right, bottom = 18 + x, 22 + y, 78 + x, 76 + y
    canvas.line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], INK, 2)
    if not closed:
        canvas.box(left + 20, top - 3, left + 34, top + 3, PAPER)
        canvas.line([(left + 20, top), (left + 31, top - 11)], INK, 2)
    canvas.box(left + 26, bottom - 8, left + 34, bottom + 8, PAPER)
    canvas.line([(left + 26, bottom - 8), (left + 26, bottom + 8)], INK, 2)
    canvas.line([(left + 34, bottom - 4), (left + 34, bottom + 4)], INK, 3)
    for i in range(lamps):
        middle = top + 10 + i * 17
        canvas.disc(right, middle, 6.5, (250, 225, 90) if closed else PAPER, outline=INK, width=1.5)
        for slope in (-1, 1):
            canvas.line([(right - 4, middle - 4 * slope), (right + 4, middle + 4 * slope)], INK, 1.5)
    picture.key = ("circuit", closed, lamps, int(x), int(y))
    return [
        ("circuit", "what are the lamps in this circuit?", "on" if closed else "off", ("on", "off")),
        ("number", "how many lamps are there?", str(lamps), NUMBERS),
    ]


def _magnets(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    north: Colour = (215, 50, 50)
    south: Colour = (50, 80, 205)
    first, second = rng.random() < 0.5, rng.random() < 0.5
    y, gap = 48 + rng.uniform(-14, 14), rng.uniform(3, 9)
    for x, flipped in ((7.0, first), (48 + gap, second)):
        canvas.box(x, y - 9, x + 18, y + 9, north if flipped else south)
        canvas.box(x + 18, y - 9, x + 36, y + 9, south if flipped else north)
    picture.key = ("magnets", first, second, int(gap), int(y) // 2)
    right = "attract" if first == second else "repel"
    return [
        ("magnets", "what will the two magnets do?", right, ("attract", "repel")),
        (
            "pole",
            "on which side of the first magnet is its red pole?",
            "left" if first else "right",
            ("left", "right"),
        ),
    ]


def _gears(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    number, clockwise = rng.randint(2, 4), rng.random() < 0.5
    names = rng.sample(("yellow", "blue", "green", "red", "purple", "orange"), number)
    radius, y = 42 / number, 52 + rng.uniform(-6, 6)
    for i, name in enumerate(names):
        x, colour = 48 - 42 + radius + 2 * radius * i, vary(rng, COLOURS[name], 10)
        for j in range(8):
            angle = j * math.pi / 4 + (i % 2) * math.pi / 8
            tooth = (x + radius * math.cos(angle), y + radius * math.sin(angle))
            canvas.line([(x, y), tooth], colour, max(3, radius * 0.3))
        canvas.disc(x, y, radius * 0.82, colour)
        canvas.disc(x, y, 2, INK)
    x, reach, top = 48 - 42 + radius, max(radius, 12), y - radius - 4
    canvas.arc((x - reach, top - 10, x + reach, top + 12), 200, 340, INK, 2)
    tip = x + reach * 0.94 if clockwise else x - reach * 0.94
    canvas.polygon([(tip - 5, top - 5), (tip + 5, top - 5), (tip, top + 4)], INK)
    picture.key = ("gears", number, clockwise, *names)
    same = number % 2 == 1
    turn = "clockwise" if clockwise == same else "counterclockwise"
    text = "the arrow shows how the first gear turns. how does the last gear turn?"
    return [
        ("gears", text, turn, ("clockwise", "counterclockwise")),
        ("number", "how many gears are there?", str(number), NUMBERS),
        ("color", "what color is the first gear?", names[0], (*names, "yellow", "blue", "green", "red")),
    ]


def _matter(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    state, name = rng.choice(("solid", "liquid", "gas")), rng.choice(("blue", "red", "green", "orange"))
    x, y = rng.uniform(-6, 6), rng.uniform(-6, 6)
    canvas.box(22 + x, 22 + y, 74 + x, 78 + y, None, outline=INK, width=2)
    if state == "solid":
        points = [(29 + 9.5 * i, 72 - 9.5 * j) for i in range(5) for j in range(3)]
    elif state == "liquid":
        points = [(28 + rng.uniform(0, 40), 73 - rng.uniform(0, 22)) for _ in range(15)]
    else:
        points = [(28 + rng.uniform(0, 40), 28 + rng.uniform(0, 44)) for _ in range(9)]
    for u, v in points:
        canvas.disc(u + x, v + y, 4.2, vary(rng, COLOURS[name], 8), outline=(40, 40, 40), width=0.5)
    picture.key = ("matter", state, name, int(x) // 3, int(y) // 3)
    return [
        ("matter", "which state of matter is shown?", state, ("solid", "liquid", "gas")),
        ("color", "what color are the particles?", name, ("blue", "red", "green", "orange")),
    ]


def _lever(rng: Random, canvas: Canvas, picture: Picture) -> Asked:
    heavy = rng.choice(("left", "right", "balanced"))
    names = rng.sample(("red", "blue", "green", "purple"), 2)
    slope = {"left": -1, "right": 1, "balanced": 0}[heavy] * rng.uniform(6, 11)
    y = 56 + rng.uniform(-5, 5)
    canvas.polygon([(48, y), (40, y + 18), (56, y + 18)], INK)
    canvas.line([(10, y - slope), (86, y + slope)], INK, 3)
    sizes = {"left": (9, 6), "right": (6, 9), "balanced": (7.5, 7.5)}[heavy]
    for side, size, name in ((-1, sizes[0], names[0]), (1, sizes[1], names[1])):
        x, low = 48 + side * 30, y + side * slope * 30 / 38 - 1.5
        canvas.box(x - size, low - 2 * size, x + size, low, vary(rng, COLOURS[name], 8))
    picture.key = ("lever", heavy, *names, int(y) // 3)
    return [
        ("lever", "which side of the lever is heavier?", heavy, ("left", "right", "balanced")),
        ("color", "what color is the left block?", names[0], ("red", "blue", "green", "purple")),
    ]


DRAWN: tuple[Callable[[Random, Canvas, Picture], Asked], ...] = (_angle, _circuit, _magnets, _gears, _matter, _lever)
