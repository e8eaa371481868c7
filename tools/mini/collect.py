"""Collect every pre-training drawing below one folder: one array and one list of names a source."""

import random
from pathlib import Path

import numpy as np

from . import classes, drawings, emoji_fonts, glyphs, names, sources

FIRST = [
    "noto-v1",
    "game-icons",
    "flat-color-icons",
    "streamline-color",
    "streamline-kameleon-color",
    "streamline-freehand-color",
    "streamline-ultimate-color",
    "healthicons",
    "temaki",
    "icon-park",
    "lucide",
]


def emoji_names(unpacked: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return squashed name -> code point and code point -> names."""
    chars = [unpacked / name / "package/chars.json" for name in ("noto-v1", "fluent-emoji-flat")]
    return names.emoji_codes(chars, unpacked / "google/package/emoji.json")


def collect(unpacked: Path, folder: Path) -> list[str]:
    """Write the drawings of all sources and return the sources; large interface sets give known concepts alone."""
    folder.mkdir(parents=True, exist_ok=True)
    _, names_of = emoji_names(unpacked)
    google = drawings.from_google(unpacked / "google", names_of)
    google.save(folder)
    vocabulary = {name for every in google.names for name in every}
    drawings.from_openclipart(unpacked / "openclipart-svg").save(folder)
    icons = sources.pretrain_icons()
    for source in [*FIRST, *[name for name in icons if name not in FIRST]]:
        found = drawings.from_icons(source, unpacked / source, vocabulary)
        found.save(folder)
        vocabulary |= {every[0] for every in found.names} if source in FIRST else set()
    fonts = sorted((unpacked / "noto-emoji/package/files").glob("*-400-normal.woff2"))
    emoji_fonts.from_fonts("noto-emoji", fonts, names_of).save(folder)
    symbola = sorted((unpacked / "fonts/fonts-symbola").rglob("*.[to]tf"))
    emoji_fonts.from_fonts("symbola", symbola, names_of).save(folder)
    latin(unpacked / "fonts").save(folder)
    scripts(unpacked / "fonts").save(folder)
    return sorted(path.stem for path in folder.glob("*.json"))


def latin(fonts: Path) -> drawings.Drawings:
    """Return letters and digits of the fonts that are not a task's."""
    files = [path for package in glyphs.LATIN_PACKAGES for path in glyphs.font_files(fonts, package)]
    drawn = list(glyphs.latin([path for path in files if "Condensed" not in path.stem]))
    return from_glyphs("latin", drawn, prefix="")


def scripts(fonts: Path, *, per_script: int = 220) -> drawings.Drawings:
    """Return words of other scripts from the characters and fonts that are not a task's."""
    drawn = []
    for script in classes.SCRIPTS:
        files = glyphs.script_fonts(fonts, script, "pretrain")
        letters = glyphs.characters(script, "pretrain")
        drawn += list(glyphs.words(script, letters, files, per_script, random.Random(script)))
    return from_glyphs("scripts", drawn, prefix="script ")


def from_glyphs(source: str, drawn: list[glyphs.Glyph], *, prefix: str) -> drawings.Drawings:
    """Return glyphs as drawings."""
    images = np.stack([image for _, _, image in drawn])
    return drawings.Drawings(source, images, [[prefix + name] for name, _, _ in drawn], [key for _, key, _ in drawn])
