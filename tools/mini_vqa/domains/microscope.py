"""Fields of a microscope: kinds and numbers of cells, stains, lesions."""

import math
from random import Random

from mini_vqa.canvas import Canvas, Colour, vary
from mini_vqa.questions import Picture, one_of

STAINS: dict[str, Colour] = {
    "pink": (245, 205, 222),
    "blue": (200, 214, 245),
    "yellow": (245, 238, 190),
    "green": (205, 238, 205),
}
CORNERS = {"top left": (30, 30), "top right": (66, 30), "bottom left": (30, 66), "bottom right": (66, 66)}
CELLS = ("lymphocyte", "neutrophil", "eosinophil")
CENTRE, REACH = 48, 45


def field(rng: Random) -> Picture:
    """Return a field with its questions."""
    stain, kind, number = rng.choice(list(STAINS)), rng.choice(CELLS), rng.randint(1, 5)
    lesion = rng.choice(list(CORNERS)) if rng.random() < 0.55 else ""
    canvas = Canvas((0, 0, 0))
    canvas.disc(CENTRE, CENTRE, REACH + 2, vary(rng, STAINS[stain], 6))
    taken: list[tuple[float, float, float]] = []
    if lesion:
        x, y = (value + rng.uniform(-3, 3) for value in CORNERS[lesion])
        edge = [(rng.uniform(7, 11), 2 * math.pi * i / 9) for i in range(9)]
        canvas.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in edge], vary(rng, (75, 45, 32), 10))
        taken.append((x, y, 11))
    for x, y, size in _places(rng, taken, number, (7.0, 8.5)):
        _white(rng, canvas, kind, x, y, size)
    number = len(taken) - bool(lesion)
    red = rng.choice([2, 3, 4, 8, 10, 12])
    for x, y, size in _places(rng, taken, red, (3.2, 4.2)):
        colour = vary(rng, (205, 80, 88), 10)
        canvas.disc(x, y, size, colour)
        canvas.disc(x, y, size * 0.4, vary(rng, (232, 140, 140), 5))
    red = len(taken) - bool(lesion) - number
    picture = Picture(canvas.finished(), key=("microscope", stain, kind, number, lesion, red > 6))
    ways = ("how many white cells are in this field?", "count the white cells.", "how many white cells are there?")
    picture.ask("white cells", rng.choice(ways), number)
    picture.ask("stain", rng.choice(("what color is the stain?", "what is the color of the stain?")), stain)
    text = rng.choice(("which type of white cell is shown?", "what kind of cell is this?"))
    picture.ask("type", one_of(rng, text, kind, CELLS) if rng.random() < 0.5 else text, kind)
    ways = ("is the tissue normal or abnormal?", "normal or abnormal tissue?")
    picture.ask("tissue", rng.choice(ways), "abnormal" if lesion else "normal")
    if lesion:
        ways = ("where is the lesion?", "in which part of the image is the lesion?")
        picture.ask("lesion", rng.choice(ways), lesion)
    ways = ("are there more red cells than white cells?", "are the red cells more than the white cells?")
    if red != number:
        picture.ask("more red", rng.choice(ways), "yes" if red > number else "no")
    return picture


def _places(
    rng: Random, taken: list[tuple[float, float, float]], number: int, sizes: tuple[float, float]
) -> list[tuple[float, float, float]]:
    """Return places for so many cells that touch nothing, and add them to those taken."""
    found: list[tuple[float, float, float]] = []
    for _ in range(400):
        if len(found) == number:
            break
        x, y, size = rng.uniform(6, 90), rng.uniform(6, 90), rng.uniform(*sizes)
        inside = math.hypot(x - CENTRE, y - CENTRE) < REACH - size
        if inside and all(math.hypot(x - a, y - b) > size + reach + 1 for a, b, reach in taken):
            found.append((x, y, size))
            taken.append((x, y, size))
    return found


def _white(rng: Random, canvas: Canvas, kind: str, x: float, y: float, size: float) -> None:
    canvas.disc(x, y, size, vary(rng, (198, 182, 226), 8), outline=(140, 120, 175), width=1)
    nucleus = vary(rng, (85, 45, 130), 10)
    if kind == "lymphocyte":
        canvas.disc(x, y, size * 0.72, nucleus)
        return
    turn, lobes = rng.uniform(0, 2 * math.pi), 3 if kind == "neutrophil" else 2
    for i in range(lobes):
        angle = turn + 2 * math.pi * i / lobes
        canvas.disc(x + size * 0.45 * math.cos(angle), y + size * 0.45 * math.sin(angle), size * 0.36, nucleus)
    if kind == "eosinophil":
        for _ in range(9):
            reach, angle = size * rng.uniform(0.2, 0.85), rng.uniform(0, 2 * math.pi)
            canvas.disc(x + reach * math.cos(angle), y + reach * math.sin(angle), 0.9, (240, 120, 60))
