"""Draw emoji from monochrome fonts: Symbola and Noto Emoji."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import ImageFont

from . import names, rasterise
from .drawings import Drawings


def font_glyphs(path: Path, codes: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield code point and drawing of each single-code emoji that a font (TrueType or WOFF2) draws."""
    font = TTFont(path)
    known = set(font.getBestCmap() or {})
    font.flavor = None
    buffer = io.BytesIO()
    font.save(buffer)
    buffer.seek(0)
    face = ImageFont.truetype(buffer, 96)
    for code in codes:
        if "-" not in code and int(code, 16) in known:
            image = rasterise.from_text(chr(int(code, 16)), face)
            if image is not None:
                yield code, image


def from_fonts(source: str, paths: list[Path], names_of: dict[str, list[str]]) -> Drawings:
    """Return the emoji of some fonts, named by code point."""
    found: dict[str, np.ndarray] = {}
    keys, images = [], []
    for path in paths:
        for code, image in font_glyphs(path, list(names_of)):
            if path.parent.name != "files" or code not in found:
                found[code] = image
                keys.append(code)
                images.append(image)
    every = [list(dict.fromkeys(names.clean(name) for name in names_of[code] if name)) for code in keys]
    return Drawings(source, np.stack(images), [[*e, *names.aliases(e[0])] for e in every], keys)
