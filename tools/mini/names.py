"""Concept names that agree across sources: one spelling for 'hot-dog', 'HOT DOG' and 'hotdog-filled'."""

import json
import re
from pathlib import Path

SUFFIXES = {
    "filled",
    "fill",
    "outline",
    "outlined",
    "line",
    "linear",
    "bold",
    "duotone",
    "solid",
    "regular",
    "light",
    "thin",
    "round",
    "rounded",
    "sharp",
    "twotone",
    "two",
    "tone",
    "color",
    "alt",
    "variant",
    "broken",
    "remix",
    "glyph",
    "icon",
    "svg",
    "symbol",
    "free",
    "style",
    "flat",
    "duo",
    "12",
    "16",
    "20",
    "24",
    "28",
    "32",
    "48",
}
SYNONYMS = {
    "hotdog": "hot dog",
    "tshirt": "t-shirt",
    "t shirt": "t-shirt",
    "tee shirt": "t-shirt",
    "shirt t": "t-shirt",
    "jeans": "trouser",
    "pants": "trouser",
    "trousers": "trouser",
    "sweater": "pullover",
    "jumper": "pullover",
    "hoodie": "pullover",
    "sweatshirt": "pullover",
    "handbag": "bag",
    "purse": "bag",
    "shopping bag": "bag",
    "clutch bag": "bag",
    "running shoe": "sneaker",
    "athletic shoe": "sneaker",
    "sneakers": "sneaker",
    "shoe sneaker": "sneaker",
    "womans boot": "ankle boot",
    "boot": "ankle boot",
    "boots": "ankle boot",
    "hiking boot": "ankle boot",
    "womans sandal": "sandal",
    "sandals": "sandal",
    "thong sandal": "sandal",
    "flip flops": "sandal",
    "flip flop": "sandal",
    "jacket": "coat",
    "overcoat": "coat",
    "doughnut": "donut",
    "automobile": "car",
    "racing car": "race car",
    "bike": "bicycle",
    "ladybug": "lady beetle",
    "hamburger": "burger",
    "aeroplane": "airplane",
    "plane": "airplane",
    "small airplane": "airplane",
    "ice cream cone": "ice cream",
    "soft ice cream": "ice cream",
    "mug": "cup",
    "telephone": "phone",
}


def clean(name: str) -> str:
    """Return the concept name of an icon, emoji or title: lower case, no variant suffixes, no numbering."""
    words = re.sub(r"[^a-z0-9 ]+", " ", name.lower().replace("'", "")).split()
    words = words[1:] if len(words) > 1 and words[0] in {"icon", "emoji", "the", "a"} else words
    while len(words) > 1 and (words[-1] in SUFFIXES or words[-1].isdigit()):
        words.pop()
    text = " ".join(words)
    return SYNONYMS.get(text, text)


def aliases(name: str) -> list[str]:
    """Return the other names a drawing of `name` may go by: without 'face' or 'head', without a plural's s."""
    found = [name.removesuffix(ending) for ending in (" face", " head", " front", " side") if name.endswith(ending)]
    if name.endswith("s") and not name.endswith("ss") and len(name) > 4:
        found.append(name[:-1])
    return [SYNONYMS.get(other, other) for other in found]


def squash(name: str) -> str:
    """Return the letters and digits of a name, to compare spellings such as 'hotdog' and 'hot-dog'."""
    return re.sub("[^a-z0-9]", "", name.lower())


def emoji_codes(chars: list[Path], emoji_json: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return squashed name -> code point, and code point -> names, from Iconify chars.json and emoji.json files."""
    code_of: dict[str, str] = {}
    names_of: dict[str, list[str]] = {}
    for path in chars:
        for code, name in json.loads(path.read_text()).items():
            code = bare(code)
            code_of.setdefault(squash(name), code)
            names_of.setdefault(code, []).append(name)
    for entry in json.loads(emoji_json.read_text()):
        code = bare(entry["unified"])
        for name in [*entry["short_names"], entry["name"] or ""]:
            code_of.setdefault(squash(name), code)
            if entry["category"] != "Flags":
                names_of.setdefault(code, []).append(name)
    return code_of, names_of


def bare(code: str) -> str:
    """Return a code point sequence without variation selectors, lower case."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")
