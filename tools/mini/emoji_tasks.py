"""The drawings of the emoji and flag tasks: which vendor draws for training, validation and test."""

import re
from pathlib import Path

import numpy as np

from . import classes, drawings, names, rasterise

TRAIN, VALIDATION, TEST = "train", "validation", "test"
FXEMOJI_NAMES = {
    "bunny": "rabbit", "bunnyside": "rabbit2", "catside": "cat2", "dogside": "dog2", "mouseside": "mouse2",
    "pigside": "pig2", "tigerside": "tiger2", "chilipepper": "hot_pepper", "sandals": "sandal", "heels": "high_heel",
}  # fmt: skip

Drawn = tuple[str, np.ndarray]
Splits = dict[str, dict[str, list[Drawn]]]


def vendor_svgs(folder: Path, code_of: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Return code point -> (icon name, SVG) of an Iconify emoji set, whatever way it spells the names."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, svg in drawings.iconify_svgs(folder):
        key = FXEMOJI_NAMES.get(name, name) if folder.name == "fxemoji" else name
        code = code_of.get(names.squash(key)) or code_of.get(names.squash(re.sub(r"-\d+$", "", key)))
        if code and "skin-tone" not in name:
            found.setdefault(code, []).append((name, svg))
    return found


def emoji_splits(unpacked: Path, task: str) -> Splits:
    """Return split -> class -> drawings: Twitter and Fluent train, FxEmoji validates, EmojiOne and Streamline test."""
    chars = [unpacked / name / "package/chars.json" for name in ("noto-v1", "fluent-emoji-flat")]
    code_of, _ = names.emoji_codes(chars, unpacked / "google/package/emoji.json")
    sets = {
        TRAIN: ["fluent-emoji-flat"],
        VALIDATION: ["fxemoji"],
        TEST: ["emojione", "streamline-emojis"],
    }
    vendors = {name: vendor_svgs(unpacked / name, code_of) for group in sets.values() for name in group}
    result: Splits = {TRAIN: {}, VALIDATION: {}, TEST: {}}
    for label, shorts in classes.EMOJI_TASKS[task].items():
        codes = [code_of[names.squash(short)] for short in shorts.split()]
        for split, group in sets.items():
            found = [
                (f"{vendor}:{name}", rasterise.from_svg(svg))
                for vendor in group
                for code in codes
                for name, svg in vendors[vendor].get(code, [])
            ]
            result[split][label] = [(key, image) for key, image in found if image is not None]
        result[TRAIN][label] += bitmap_emoji(unpacked, codes)
    return result


def bitmap_emoji(unpacked: Path, codes: list[str]) -> list[Drawn]:
    """Return the Twitter and Fluent 3D drawings of code points, where they have them."""
    found = []
    for code in codes:
        for vendor, folder, suffix in (
            ("twitter", "twitter/package/img/twitter/64", "png"),
            ("fluent-3d", "f3d/package/assets", "webp"),
        ):
            paths = [unpacked / folder / f"{code}{extra}.{suffix}" for extra in ("", "-fe0f")]
            for path in [path for path in paths if path.exists()][:1]:
                image = rasterise.from_bitmap(path.read_bytes())
                if image is not None:
                    found.append((f"{vendor}:{code}", image))
    return found


def flag_splits(unpacked: Path) -> Splits:
    """Return flags: flag-icons and circle-flags train, EmojiOne validates, flagpack and Twitter test."""
    emojione = dict(drawings.iconify_svgs(unpacked / "emojione"))
    circle = dict(drawings.iconify_svgs(unpacked / "circle-flags"))
    pack = dict(drawings.iconify_svgs(unpacked / "flagpack"))
    result: Splits = {TRAIN: {}, VALIDATION: {}, TEST: {}}
    for code, label in classes.FLAGS.items():
        text = (unpacked / f"flag-icons/package/flags/4x3/{code}.svg").read_text()
        rectangles = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)
        twitter = rasterise.from_bitmap((unpacked / f"twitter/package/img/twitter/64/{rectangles}.png").read_bytes())
        every = {
            TRAIN: {f"flag-icons:{code}": text, f"circle-flags:{code}": circle[code]},
            VALIDATION: {f"emojione:{code}": emojione["flag-for-" + label.replace(" ", "-")]},
            TEST: {f"flagpack:{code}": pack[code if code in pack else f"{code}-ukm"]},
        }
        for split, svgs in every.items():
            drawn = [(key, rasterise.from_svg(svg)) for key, svg in svgs.items()]
            result[split][label] = [(key, image) for key, image in drawn if image is not None]
        result[TEST][label] += [(f"twitter:{code}", twitter)] if twitter is not None else []
    return result


def counts(splits: Splits) -> str:
    """Return the fewest and the total drawings of each split, for the build's log."""
    parts = []
    for split, by_class in splits.items():
        sizes = {label: len(drawn) for label, drawn in by_class.items()}
        parts.append(
            f"{split} {sum(sizes.values())} (fewest {min(sizes.values())}: {min(sizes, key=sizes.__getitem__)})"
        )
    return ", ".join(parts)
