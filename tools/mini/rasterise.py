"""Turn SVG text, bitmap files and font glyphs into square RGBA arrays of one size."""

import io

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFont

SIZE = 72


def from_svg(svg: str, *, size: int = SIZE) -> np.ndarray | None:
    """Return the SVG fitted into a `[size, size, 4]` uint8 array, or None where it cannot be drawn or is empty."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size * 2, skip_system_fonts=True)
    except ValueError:
        return None
    return from_bitmap(bytes(png), size=size)


def from_bitmap(data: bytes, *, size: int = SIZE) -> np.ndarray | None:
    """Return a PNG or WebP, cropped to what is drawn and fitted into a `[size, size, 4]` uint8 array."""
    return fit(Image.open(io.BytesIO(data)).convert("RGBA"), size=size)


def fit(image: Image.Image, *, size: int = SIZE) -> np.ndarray | None:
    """Return the drawn part of an RGBA image centred in a square with two pixels of margin."""
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = (size - 4) / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGBa").resize(shape, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image.convert("RGBA"), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(canvas)


def from_text(text: str, font: ImageFont.FreeTypeFont, *, size: int = SIZE) -> np.ndarray | None:
    """Return `text` in black, as large as fits, or None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(text)
    if right - left < 2 or bottom - top < 2:
        return None
    image = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(image).text((4 - left, 4 - top), text, font=font, fill=255)
    rgba = Image.merge("RGBA", (*[Image.new("L", image.size)] * 3, image))
    return fit(rgba, size=size)
