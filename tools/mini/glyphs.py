"""Draw letters, digits and the characters of other scripts with many fonts, split by font and by character."""

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import ImageFont

from . import classes, rasterise

LATIN_TASK_PACKAGE = "fonts-aenigma"
LATIN_PACKAGES = [
    "fonts-agave", "fonts-allerta", "fonts-anonymous-pro", "fonts-apropal", "fonts-arapey", "fonts-averia-gwf",
    "fonts-averia-sans-gwf", "fonts-averia-serif-gwf", "fonts-bajaderka", "fonts-bebas-neue", "fonts-blankenburg",
    "fonts-breip", "fonts-bwht", "fonts-cabin", "fonts-cabinsketch", "fonts-cantarell", "fonts-cherrybomb",
    "fonts-comfortaa", "fonts-comic-neue", "fonts-compagnon", "fonts-courier-prime", "fonts-crosextra-caladea",
    "fonts-crosextra-carlito", "fonts-dancingscript", "fonts-dosis", "fonts-dotgothic16", "fonts-ebgaramond",
    "fonts-eurofurence", "fonts-fantasma", "fonts-fantasque-sans", "fonts-fanwood", "fonts-firacode",
    "fonts-gotico-antiqua", "fonts-goudybookletter", "fonts-humor-sans", "fonts-inconsolata", "fonts-inter",
    "fonts-jetbrains-mono", "fonts-junicode", "fonts-kaushanscript", "fonts-klee", "fonts-kristi", "fonts-lato",
    "fonts-league-spartan", "fonts-leckerli-one", "fonts-lobster", "fonts-lobstertwo", "fonts-mplus",
    "fonts-national-park", "fonts-okolaks", "fonts-opendin", "fonts-prociono",
    "fonts-quattrocento", "fonts-quicksand", "fonts-radisnoir", "fonts-rampart", "fonts-reggae", "fonts-roadgeek",
    "fonts-roboto-slab", "fonts-roboto-unhinted", "fonts-rocknroll", "fonts-sil-andika", "fonts-sil-charis",
    "fonts-sil-gentiumplus", "fonts-smiley-sans", "fonts-sora", "fonts-stick", "fonts-train",
    "fonts-yusei-magic", "fonts-noto-core", "fonts-dejavu-core",
]  # fmt: skip
SCRIPT_TEST_FONTS: dict[str, str] = {
    "arabic": "fonts-hosny-amiri fonts-sil-scheherazade fonts-sil-lateef", "armenian": "fonts-dejavu-core",
    "bengali": "fonts-lohit-beng-bengali", "cyrillic": "fonts-open-sans fonts-play fonts-vollkorn",
    "devanagari": "fonts-lohit-deva fonts-sil-annapurna", "ethiopic": "fonts-sil-abyssinica",
    "georgian": "fonts-dejavu-core", "greek": "fonts-open-sans fonts-play fonts-vollkorn",
    "gujarati": "fonts-lohit-gujr", "gurmukhi": "fonts-lohit-guru", "hebrew": "fonts-sil-ezra",
    "kannada": "fonts-lohit-knda", "khmer": "fonts-sil-mondulkiri", "lao": "fonts-dejavu-core",
    "malayalam": "fonts-lohit-mlym fonts-smc-chilanka", "myanmar": "fonts-sil-padauk",
    "tamil": "fonts-lohit-taml", "telugu": "fonts-lohit-telu",
}  # fmt: skip
NOTO_NAMES = {"cyrillic": "", "greek": ""}

Glyph = tuple[str, str, np.ndarray]


def font_files(fonts: Path, package: str) -> list[Path]:
    """Return the font files of an unpacked font package, slanted duplicates and documentation left out."""
    files = [path for kind in ("*.ttf", "*.otf") for path in (fonts / package).rglob(kind) if "/doc/" not in str(path)]
    files = [path for path in files if not any(part in path.stem for part in ("Italic", "Oblique", "Slanted"))]
    return sorted(files, key=lambda path: path.name)


@cache
def character_map(path: Path) -> frozenset[int]:
    """Return the code points a font draws."""
    with TTFont(path, fontNumber=0, lazy=True) as font:
        return frozenset(font.getBestCmap() or {})


def covers(path: Path, text: str) -> bool:
    """Tell whether a font has every character of `text`."""
    return all(ord(character) in character_map(path) for character in text)


def latin(files: list[Path]) -> Iterator[Glyph]:
    """Yield class ('letter a', 'digit zero'), key and drawing for each letter in both cases and each digit."""
    for path in files:
        if re.match(r"Noto\w+-", path.stem) and not re.match(r"Noto(Sans|Serif)(Mono|Display)?-", path.stem):
            continue
        if not covers(path, "ABZabz059"):
            continue
        font = ImageFont.truetype(str(path), 80)
        for number, letter in enumerate([*"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"]):
            name = f"digit {classes.DIGITS[number - 52]}" if number >= 52 else f"letter {letter.lower()}"
            image = rasterise.from_text(letter, font)
            if image is not None:
                yield name, f"{path.stem}:{letter}", image


def characters(script: str, part: str) -> list[str]:
    """Return the letters of a script that belong to a part: pretrain (60 %), validation (20 %) or test (20 %)."""
    low, high = classes.SCRIPTS[script]
    letters = [chr(code) for code in range(low, high + 1) if chr(code).isalpha()]
    random.Random(script).shuffle(letters)
    first, second = round(len(letters) * 0.6), round(len(letters) * 0.8)
    return {"pretrain": letters[:first], "validation": letters[first:second], "test": letters[second:]}[part]


def script_fonts(fonts: Path, script: str, part: str) -> list[Path]:
    """Return the fonts of a script for a part: Noto Sans for pre-training, Noto Serif for training, others else."""
    if part in {"validation", "test"}:
        return [path for package in SCRIPT_TEST_FONTS[script].split() for path in font_files(fonts, package)]
    stem = NOTO_NAMES.get(script, script.capitalize())
    kind = "Sans" if part == "pretrain" else "Serif"
    if script == "arabic" and part == "train":
        kind = "Naskh"
    return [
        path
        for package in ("fonts-noto-core", "fonts-noto-extra")
        for path in font_files(fonts, package)
        if path.stem.startswith(f"Noto{kind}{stem}-") and "Condensed" not in path.stem
    ]


def words(script: str, letters: list[str], files: list[Path], count: int, rng: random.Random) -> Iterator[Glyph]:
    """Yield up to `count` drawings of one to three random letters of a script in random fonts that have them."""
    known = {path: [letter for letter in letters if covers(path, letter)] for path in files}
    fonts = {path: ImageFont.truetype(str(path), 60) for path in files if len(known[path]) >= 3}
    seen: set[str] = set()
    for _ in range(count * 20):
        path = rng.choice(list(fonts))
        text = "".join(rng.choices(known[path], k=rng.choice([1, 2, 2, 3])))
        image = rasterise.from_text(text, fonts[path])
        if f"{path.stem}:{text}" not in seen and image is not None:
            seen.add(f"{path.stem}:{text}")
            yield script, f"{path.stem}:{text}", image
        if len(seen) == count:
            return
