"""Road scenes from behind the wheel: lights, lanes, signs, people, and what to do."""

import math
from random import Random

from mini_vqa.canvas import COLOURS, SIZE, Canvas, Colour, around, vary
from mini_vqa.questions import Picture, one_of

LIGHTS: dict[str, Colour] = {"red": (255, 45, 45), "yellow": (255, 220, 50), "green": (50, 240, 90)}
LANES = {"left": -2 / 3, "middle": 0.0, "right": 2 / 3}
SIGNS = ("stop", "yield", "speed limit")
SPEEDS = ("30", "50", "70", "90")
CARS = ("red", "blue", "white", "yellow")


def road(rng: Random) -> Picture:
    """Return a road with its questions."""
    light = rng.choice((*LIGHTS, "")) if rng.random() < 0.8 else ""
    lane, near, car = rng.choice(list(LANES)), rng.random() < 0.5, rng.choice(CARS)
    sign, speed, person = rng.choice((*SIGNS, "speed limit", "")), rng.choice(SPEEDS), rng.random() < 0.4
    night = rng.random() < 0.3
    canvas = Canvas((20, 25, 50) if night else vary(rng, (150, 195, 235)))
    horizon, centre = rng.uniform(36, 42), 48 + rng.uniform(-4, 4)
    canvas.box(0, horizon, SIZE, SIZE, (25, 42, 25) if night else vary(rng, (95, 140, 80)))
    view = _View(horizon, centre)
    _asphalt(canvas, view, (58, 58, 61) if night else (98, 98, 101))
    if sign:
        _sign(rng, canvas, sign, speed)
    if light:
        _light(rng, canvas, light)
    depth = rng.uniform(0.5, 0.65) if near else rng.uniform(0.14, 0.22)
    _car(canvas, *view.at(LANES[lane], depth), 4 + 11 * depth, vary(rng, COLOURS[car], 8))
    if person:
        _person(rng, canvas)
    picture = Picture(canvas.finished(), key=("roads", light, lane, near, car, sign, person, night))
    ways = ("in which lane is the car ahead?", "which lane does the vehicle ahead use, left, middle or right?")
    picture.ask("lane", rng.choice(ways), lane)
    stop = person or light in ("red", "yellow") or sign == "stop"
    picture.ask("decision", rng.choice(("should we stop or go?", "stop or go?")), "stop" if stop else "go")
    ways = ("is the car ahead near or far?", "how close is the vehicle ahead, near or far?")
    picture.ask("distance", rng.choice(ways), "near" if near else "far")
    picture.ask("car", rng.choice(("what color is the car ahead?", "what is the color of the vehicle ahead?")), car)
    ways = ("is there a pedestrian on the road?", "is a pedestrian crossing?", "is there a person on the road?")
    picture.ask("pedestrian", rng.choice(ways), "yes" if person else "no")
    if light:
        ways = ("what color is the traffic light?", "which color does the traffic light show?")
        picture.ask("light", rng.choice(ways), light)
    if sign == "speed limit":
        ways = ("what is the speed limit?", "which number is on the sign?")
        picture.ask("speed", rng.choice(ways), speed)
    if sign:
        text = rng.choice(("which traffic sign is shown?", "what kind of sign is this?"))
        picture.ask("sign", one_of(rng, text, sign, SIGNS) if rng.random() < 0.5 else text, sign)
    return picture


class _View:
    """Where a place on the road is in the picture: `side` from -1 to 1, `depth` from 0, far, to 1."""

    def __init__(self, horizon: float, centre: float) -> None:
        self.horizon, self.centre = horizon, centre

    def at(self, side: float, depth: float) -> tuple[float, float]:
        """Return the point of a place."""
        x = self.centre + side * (7 + 53 * depth) + (48 - self.centre) * depth
        return x, self.horizon + (SIZE - self.horizon) * depth


def _asphalt(canvas: Canvas, view: _View, colour: Colour) -> None:
    canvas.polygon([view.at(-1, 0), view.at(1, 0), view.at(1, 1), view.at(-1, 1)], colour)
    for side in (-1 / 3, 1 / 3):
        for i in range(5):
            start, end = ((i + 0.1) / 5) ** 1.6, ((i + 0.6) / 5) ** 1.6
            canvas.line([view.at(side, start), view.at(side, end)], (235, 235, 235), 1 + 2 * end)


def _car(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    canvas.box(x - size, y - size * 0.9, x + size, y, colour)
    canvas.box(x - size * 0.7, y - size * 1.6, x + size * 0.7, y - size * 0.9, colour)
    canvas.box(x - size * 0.55, y - size * 1.45, x + size * 0.55, y - size * 0.95, (120, 160, 180))
    for side in (-1, 1):
        wheel = sorted((x + side * size * 0.5, x + side * size * 0.9))
        canvas.box(wheel[0], y, wheel[1], y + size * 0.25, (10, 10, 10))
        edge = sorted((x + side * size, x + side * size * 0.7))
        canvas.box(edge[0], y - size * 0.5, edge[1], y - size * 0.25, (170, 15, 15))


def _light(rng: Random, canvas: Canvas, light: str) -> None:
    x, y = rng.uniform(18, 58), rng.uniform(3, 7)
    canvas.box(x - 6, y, x + 6, y + 28, (30, 30, 30))
    for i, (name, colour) in enumerate(LIGHTS.items()):
        canvas.disc(x, y + 5 + 9 * i, 3.8, colour if name == light else (72, 72, 72))


def _sign(rng: Random, canvas: Canvas, sign: str, speed: str) -> None:
    x, y = rng.uniform(76, 84), rng.uniform(24, 30)
    canvas.line([(x, y), (x, y + 30)], (110, 110, 110), 2)
    if sign == "stop":
        canvas.polygon(around(x, y, 11, 8, math.pi / 8), (200, 25, 30))
        canvas.box(x - 6, y - 2, x + 6, y + 1.5, (255, 255, 255))
    elif sign == "yield":
        canvas.polygon([(x - 11, y - 9), (x + 11, y - 9), (x, y + 10)], (200, 25, 30))
        canvas.polygon([(x - 5.5, y - 5.5), (x + 5.5, y - 5.5), (x, y + 4)], (255, 255, 255))
    else:
        canvas.disc(x, y, 11, (255, 255, 255), outline=(200, 25, 30), width=2)
        canvas.text(x, y, speed, (20, 20, 20), size=11, face="DejaVuSans-Bold")


def _person(rng: Random, canvas: Canvas) -> None:
    x, y = rng.uniform(25, 70), rng.uniform(72, 80)
    colour = rng.choice(((230, 130, 40), (60, 60, 160), (180, 60, 150)))
    canvas.disc(x, y - 16, 3.2, (235, 190, 160))
    canvas.box(x - 3.6, y - 13, x + 3.6, y - 1, colour)
    for side in (-2, 2):
        canvas.line([(x + side, y - 1), (x + 1.5 * side, y + 9)], (30, 30, 40), 2)
