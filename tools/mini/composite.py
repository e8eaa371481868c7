"""Place a drawing on a random background: the fixed composites of the task archives (numpy and Pillow, seeded)."""

import numpy as np
from PIL import Image

SIZE = 64


def background(rng: np.random.Generator) -> np.ndarray:
    """Return a `[SIZE, SIZE, 3]` float background: white, pale or a soft gradient of two pale colours."""
    kind = rng.choice(["white", "pale", "gradient"], p=[0.5, 0.3, 0.2])
    first, second = rng.uniform(190, 255, 3), rng.uniform(190, 255, 3)
    if kind == "white":
        return np.full((SIZE, SIZE, 3), 255.0)
    if kind == "pale":
        return np.broadcast_to(first, (SIZE, SIZE, 3)).copy()
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * (xs - 0.5) + np.sin(angle) * (ys - 0.5)) / 1.42 + 0.5
    return first + (second - first) * ramp[..., None]


def compose(drawing: np.ndarray, rng: np.random.Generator, *, turn: float = 12.0, ink: bool = False) -> np.ndarray:
    """Return a `[SIZE, SIZE, 3]` uint8 image of an RGBA drawing, randomly scaled, turned and placed.

    `ink` gives a black drawing (a glyph) a random dark colour.
    """
    image = Image.fromarray(drawing, "RGBA").convert("RGBa")
    image = image.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    extent = round(SIZE * rng.uniform(0.75, 1.0))
    image = image.resize((extent, extent), Image.Resampling.BOX if extent < image.width else Image.Resampling.BICUBIC)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(image, tuple(int(rng.integers(-2, SIZE - extent + 3)) for _ in range(2)))
    pixels = np.asarray(canvas, np.float32)
    alpha, behind = pixels[..., 3:] / 255, background(rng)
    colour = pixels[..., :3]
    if ink:
        colour = alpha * rng.uniform(0, 90, 3)
    return np.clip(colour + behind * (1 - alpha), 0, 255).astype(np.uint8)


def enlarge(grey: np.ndarray) -> np.ndarray:
    """Return a small grey image as `[SIZE, SIZE, 3]` uint8."""
    return np.asarray(Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))
