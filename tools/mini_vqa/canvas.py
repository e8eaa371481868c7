"""Pictures of 96 x 96 pixels: a canvas that draws smooth edges, colours, shapes and writing."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
FINE = 2  # Everything is drawn this many times as large, and made smaller by averaging.

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
    "cyan": (60, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono")


@lru_cache(maxsize=400)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font that matplotlib ships."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf")), size)


def vary(rng: Random, colour: Colour, by: int = 18) -> Colour:
    """Return a colour nearby."""
    red, green, blue = (max(0, min(255, value + rng.randint(-by, by))) for value in colour)
    return red, green, blue


def contrast(one: Colour, other: Colour) -> int:
    """Return how far apart two colours are."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


class Canvas:
    """What is drawn on, in units of pixels of the finished picture."""

    def __init__(self, ground: Colour | Image.Image = (255, 255, 255)) -> None:
        side = SIZE * FINE
        if isinstance(ground, Image.Image):
            self._image = ground.resize((side, side), Image.Resampling.BILINEAR)
        else:
            self._image = Image.new("RGB", (side, side), ground)
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        """Return the picture."""
        return self._image.reduce(FINE)

    def colour_at(self, x: float, y: float) -> Colour:
        """Return the colour of a place."""
        return self._image.getpixel((int(x * FINE), int(y * FINE)))  # type: ignore[return-value]

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | None, **edge: object) -> None:
        """Draw a rectangle; `edge` may have outline and width."""
        self._draw.rectangle(self._of(x0, y0, x1, y1), fill=fill, **self._fine(edge))

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | None, **edge: object) -> None:
        """Draw an ellipse."""
        self._draw.ellipse(self._of(x0, y0, x1, y1), fill=fill, **self._fine(edge))

    def disc(self, x: float, y: float, radius: float, fill: Colour | None, **edge: object) -> None:
        """Draw a circle around a point."""
        self.oval(x - radius, y - radius, x + radius, y + radius, fill, **edge)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * FINE, y * FINE) for x, y in points], fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float = 2) -> None:
        """Draw a line through points."""
        fine = [(x * FINE, y * FINE) for x, y in points]
        self._draw.line(fine, fill=fill, width=max(1, round(width * FINE)), joint="curve")

    def arc(self, box: tuple[float, float, float, float], start: float, end: float, fill: Colour, width: float) -> None:
        """Draw a part of the edge of an ellipse; angles in degrees, clockwise from the right."""
        self._draw.arc(self._of(*box), start, end, fill=fill, width=round(width * FINE))

    def pie(self, x: float, y: float, radius: float, start: float, end: float, fill: Colour) -> None:
        """Draw a slice of a disc."""
        self._draw.pieslice(self._of(x - radius, y - radius, x + radius, y + radius), start, end, fill=fill)

    def paste(self, image: Image.Image, x: int, y: int, size: int) -> None:
        """Lay an image on the canvas."""
        self._image.paste(image.resize((size * FINE, size * FINE), Image.Resampling.BICUBIC), (x * FINE, y * FINE))

    def text(self, x: float, y: float, words: str, fill: Colour, *, size: int, face: str = FONTS[0]) -> None:
        """Write around a point."""
        self._draw.text((x * FINE, y * FINE), words, fill=fill, font=font(face, size * FINE), anchor="mm")

    def text_size(self, words: str, *, size: int, face: str) -> tuple[float, float]:
        """Return width and height of a text."""
        left, top, right, bottom = self._draw.textbbox((0, 0), words, font=font(face, size * FINE), anchor="mm")
        return (right - left) / FINE, (bottom - top) / FINE

    def shape(self, kind: str, x: float, y: float, size: float, colour: Colour) -> None:
        """Draw one of the shapes; `size` is half its width."""
        if kind == "circle":
            self.disc(x, y, size, colour)
        elif kind == "ring":
            self.disc(x, y, size, None, outline=colour, width=max(2.5, size * 0.35))
        elif kind == "square":
            self.box(x - size * 0.85, y - size * 0.85, x + size * 0.85, y + size * 0.85, colour)
        elif kind == "cross":
            arm = size * 0.33
            self.box(x - arm, y - size, x + arm, y + size, colour)
            self.box(x - size, y - arm, x + size, y + arm, colour)
        elif kind == "heart":
            self.oval(x - size, y - size * 0.8, x, y + size * 0.2, colour)
            self.oval(x, y - size * 0.8, x + size, y + size * 0.2, colour)
            low = [(x - size * 0.93, y - size * 0.05), (x + size * 0.93, y - size * 0.05), (x, y + size)]
            self.polygon(low, colour)
        else:
            self.polygon([(x + size * u, y + size * v) for u, v in OUTLINES[kind]], colour)

    def _of(self, *values: float) -> list[float]:
        return [value * FINE for value in values]

    def _fine(self, edge: dict[str, object]) -> dict[str, object]:
        return {key: round(value * FINE) if key == "width" else value for key, value in edge.items()}  # type: ignore[operator]


def around(x: float, y: float, radius: float, corners: int, turn: float = 0.0) -> list[Point]:
    """Return the corners of a regular polygon."""
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _star() -> list[Point]:
    angles = [-math.pi / 2 + i * math.pi / 5 for i in range(10)]
    reach = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(reach, angles, strict=True)]


OUTLINES: dict[str, list[Point]] = {
    "triangle": [(0, -1), (-1, 0.8), (1, 0.8)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": _star(),
}
