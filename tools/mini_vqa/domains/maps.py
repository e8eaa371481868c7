"""Map views: land use, buildings, rivers and lakes from above."""

import math
from random import Random

from mini_vqa.canvas import SIZE, Canvas, Colour, vary
from mini_vqa.questions import Picture, one_of

GROUND: dict[str, tuple[Colour, ...]] = {
    "farmland": ((190, 170, 90), (120, 150, 60), (160, 190, 90), (150, 120, 70)),
    "forest": ((40, 80, 40), (52, 98, 46)),
    "desert": ((215, 190, 140), (203, 172, 118)),
    "city": ((150, 150, 148), (120, 122, 125)),
}
ROOFS: dict[str, Colour] = {
    "red": (205, 60, 50),
    "white": (240, 240, 240),
    "blue": (60, 90, 190),
    "black": (35, 35, 40),
}
SIDES = ("left", "right", "top", "bottom")


def land(rng: Random) -> Picture:
    """Return a map view with its questions."""
    use, roof = rng.choice(list(GROUND)), rng.choice(list(ROOFS))
    number, water = rng.randint(1, 6), rng.choice(("none", "river", "lake", "lake", "river"))
    run = rng.choice(("horizontal", "vertical")) if water == "river" else ""
    side = rng.choice(SIDES) if water == "lake" else ""
    canvas = Canvas(GROUND[use][0])
    _ground(rng, canvas, use)
    taken = _water(rng, canvas, run, side)
    number = _buildings(rng, canvas, ROOFS[roof], number, taken)
    picture = Picture(canvas.finished(), key=("maps", use, number, roof, water, run or side))
    ways = ("what is the main land use in this satellite image?", "which land use is dominant on this map?")
    picture.ask("land use", one_of(rng, rng.choice(ways), use, list(GROUND)) if rng.random() < 0.5 else ways[0], use)
    ways = ("how many buildings are visible?", "count the buildings.", "how many buildings are there?")
    picture.ask("buildings", rng.choice(ways), number)
    picture.ask("roofs", rng.choice(("what color are the roofs?", "what is the color of the buildings?")), roof)
    if run:
        ways = ("is the river horizontal or vertical?", "how does the river run, horizontal or vertical?")
        picture.ask("river", rng.choice(ways), run)
    if side:
        ways = ("where is the lake?", "in which part of the map is the lake?", "on which side is the lake?")
        picture.ask("lake", rng.choice(ways), side)
    ways = ("which kind of water is there, river, lake or none?", "is there a river, a lake or none?")
    picture.ask("water", rng.choice(ways), water)
    return picture


def _ground(rng: Random, canvas: Canvas, use: str) -> None:
    colours = GROUND[use]
    if use == "farmland":
        step = rng.choice((16, 24, 32))
        for x in range(0, SIZE, step):
            for y in range(0, SIZE, step):
                colour = vary(rng, rng.choice(colours))
                canvas.box(x, y, x + step, y + step, colour)
                if rng.random() < 0.4:
                    for i in range(0, step, 4):
                        canvas.line([(x + i, y), (x + i, y + step)], vary(rng, colour, 8), 1)
    elif use == "forest":
        for _ in range(150):
            canvas.disc(
                rng.uniform(0, SIZE), rng.uniform(0, SIZE), rng.uniform(2, 5), vary(rng, rng.choice(colours), 12)
            )
    elif use == "desert":
        for _ in range(14):
            x, y = rng.uniform(-40, 40), rng.uniform(0, SIZE)
            box = (x, y, x + rng.uniform(60, 100), y + rng.uniform(10, 30))
            canvas.arc(box, 180, 360, vary(rng, colours[1], 10), 2)
    else:
        for start in (rng.randint(4, 12), rng.randint(4, 12)):
            for i in range(start, SIZE, 24):
                canvas.line([(i, 0), (i, SIZE)], (95, 95, 98), 2.5)
                canvas.line([(0, i + start), (SIZE, i + start)], (95, 95, 98), 2.5)


def _water(rng: Random, canvas: Canvas, run: str, side: str) -> list[tuple[float, float, float]]:
    """Draw a river or a lake; return discs that buildings keep out of."""
    colour = vary(rng, (45, 100, 160), 12)
    if run:
        middle, swing, start = rng.uniform(26, 70), rng.uniform(3, 9), rng.uniform(0, 6)
        points = [(t, middle + swing * math.sin(t / 14 + start)) for t in range(-5, SIZE + 6, 4)]
        points = [(y, x) for x, y in points] if run == "vertical" else points
        canvas.line(points, colour, rng.uniform(7, 11))
        return [(x, y, 12.0) for x, y in points]
    if side:
        x, y = {"left": (17.0, 48.0), "right": (79.0, 48.0), "top": (48.0, 17.0), "bottom": (48.0, 79.0)}[side]
        along = rng.uniform(-12, 12)
        x, y = (x, y + along) if side in ("left", "right") else (x + along, y)
        wide, high = rng.uniform(10, 15), rng.uniform(10, 15)
        canvas.oval(x - wide, y - high, x + wide, y + high, colour)
        return [(x, y, 22.0)]
    return []


def _buildings(rng: Random, canvas: Canvas, roof: Colour, number: int, taken: list[tuple[float, float, float]]) -> int:
    placed: list[tuple[float, float]] = []
    for _ in range(400):
        if len(placed) == number:
            break
        x, y, size = rng.uniform(8, SIZE - 9), rng.uniform(8, SIZE - 9), rng.uniform(4.5, 6)
        near = any(math.hypot(x - a, y - b) < 16 for a, b in placed)
        if near or any(math.hypot(x - a, y - b) < reach for a, b, reach in taken):
            continue
        canvas.box(x - size + 2, y - size + 2, x + size + 2, y + size + 2, (45, 45, 45))
        canvas.box(x - size, y - size, x + size, y + size, vary(rng, roof, 8), outline=(20, 20, 20), width=0.5)
        placed.append((x, y))
    return len(placed)
