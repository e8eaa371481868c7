"""General pictures made of the drawings of `mini`: one large, or a grid of up to four."""

import io
import zipfile
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image

from .canvas import SIZE, Canvas
from .questions import Picture, article, one_of, options, place_of, plural
from .scenes import PLAIN, background

ARCHIVES = Path(__file__).parents[2] / "src/keeplora/data/mini/data"
# How often a drawing is of a task of `mini`, and what its classes are called together.
WEIGHTS = {"animals": 4, "food": 3, "objects": 3, "vehicles": 3, "places": 2, "digits": 2, "letters": 2}
KINDS = {
    "animals": "animal",
    "food": "food",
    "objects": "object",
    "vehicles": "vehicle",
    "places": "place",
    "digits": "digit",
    "letters": "letter",
}
NAMING = {
    "digits": ("what digit is this?", "which digit is shown?"),
    "letters": ("what letter is this?", "which letter is shown?"),
}
WHAT = ("what is this?", "what does the image show?", "what is shown in the picture?", "name the object.")
WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"} | {
    "six": "6", "seven": "7", "eight": "8", "nine": "9"
}  # fmt: skip


@cache
def drawings(task: str, split: str) -> dict[str, list[bytes]]:
    """Return the files of a task of `mini`, by class."""
    files: dict[str, list[bytes]] = {}
    with zipfile.ZipFile(ARCHIVES / f"{task}.zip") as archive:
        for name in archive.namelist():
            part, label, _ = name.split("/")
            if part == split:
                files.setdefault(WORDS.get(label, label), []).append(archive.read(name))
    return files


def drawing_of(rng: Random, task: str, label: str, split: str) -> Image.Image:
    """Return one drawing of a class."""
    return Image.open(io.BytesIO(rng.choice(drawings(task, split)[label]))).convert("RGB")


def one_drawing(rng: Random, split: str) -> Picture:
    """Return a picture of one drawing, at any place and of any size."""
    task = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    labels = sorted(drawings(task, split))
    label = rng.choice(labels)
    image = drawing_of(rng, task, label, split)
    size = rng.randint(56, SIZE)
    canvas = Canvas(image.getpixel((0, 0))) if rng.random() < 0.7 else background(rng)
    canvas.paste(image, rng.randint(0, SIZE - size), rng.randint(0, SIZE - size), size)
    picture = Picture(canvas.finished(), key=("drawing", task, label))
    text, kind = rng.choice(NAMING.get(task, WHAT)), KINDS[task]
    few = rng.sample(labels, min(6, len(labels)))
    picture.ask("name", text, label)
    picture.ask("name or", one_of(rng, text, label, few), label)
    picture.ask("name option", *options(rng, text, label, few))
    asked = label if rng.random() < 0.5 else rng.choice([other for other in labels if other != label])
    thing = f"the {kind} {asked}" if task in NAMING else article(asked)
    text = rng.choice(("is this {}?", "does the image show {}?")).format(thing)
    picture.ask("yes/no", text, "yes" if asked == label else "no")
    kinds = sorted(set(KINDS.values()))
    text = rng.choice(("what kind of thing is this?", "which category does it belong to?"))
    picture.ask("category", text, kind)
    picture.ask("category option", *options(rng, text, kind, rng.sample(kinds, 5)))
    asked = kind if rng.random() < 0.5 else rng.choice([other for other in kinds if other != kind])
    picture.ask("yes/no", f"is this {article(asked)}?", "yes" if asked == kind else "no")
    return picture


def grid(rng: Random, split: str) -> Picture:
    """Return a picture of two to four drawings."""
    tasks = [task for task in WEIGHTS if task not in NAMING]
    number, half = rng.randint(2, 4), SIZE // 2
    cells = [(0, 0), (half, 0), (0, half), (half, half)]
    rng.shuffle(cells)
    if number == 2:
        cells = rng.choice(([(0, half // 2), (half, half // 2)], [(half // 2, 0), (half // 2, half)]))
    canvas, shown = Canvas(rng.choice(PLAIN)), []
    for x, y in cells[:number]:
        task = rng.choice(tasks)
        label = rng.choice(sorted(drawings(task, split)))
        canvas.paste(drawing_of(rng, task, label, split), x, y, half)
        shown.append((task, label, place_of(x + half / 2, y + half / 2)))
    labels = [label for _, label, _ in shown]
    picture = Picture(canvas.finished(), key=("grid", *sorted(labels)))
    picture.ask("count", rng.choice(("how many pictures are there?", "how many things are shown?")), number)
    task, label, place = rng.choice(shown)
    picture.ask("at place", f"what is {'at' if ' ' in place else 'on'} the {place}?", label)
    single = [one for one in shown if labels.count(one[1]) == 1]
    if single:
        task, label, place = rng.choice(single)
        text = rng.choice(("where is the {}?", "in which part of the image is the {}?")).format(label)
        picture.ask("place", text, place)
        picture.ask("place option", *options(rng, text, place, [place for *_, place in shown]))
    task, label, _ = rng.choice(shown)
    others = [other for other in sorted(drawings(task, split)) if other not in labels]
    asked = label if rng.random() < 0.5 else rng.choice(others)
    text = rng.choice(("is there {}?", "can you see {}?")).format(article(asked))
    picture.ask("yes/no", text, "yes" if asked in labels else "no")
    task = rng.choice(shown)[0] if rng.random() < 0.7 else rng.choice(tasks)
    kind = KINDS[task] if task == "food" else plural(KINDS[task])
    picture.ask("count", f"how many {kind} are there?", sum(one[0] == task for one in shown))
    if len(single) > 1 and number == 2:
        (_, first, here), (_, second, _) = rng.sample(single, 2)
        if here in ("left", "right"):
            picture.ask("relation", f"is the {first} left or right of the {second}?", here)
        else:
            answer = "above" if here == "top" else "below"
            picture.ask("relation", f"is the {first} above or below the {second}?", answer)
    picture.ask("list", "list the objects.", ", ".join(sorted(labels)))
    return picture
