"""Is the data of every task there, whole, and fit to learn from? All that is wrong is found, not only the first."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from PIL import Image

from keeplora.data.benchmark import TaskSpec
from keeplora.data.conversations import Conversations
from keeplora.data.images import UNREADABLE_IMAGE, Examples
from keeplora.data.readers import examine_splits, read_conversations, stored_splits
from keeplora.errors import counted, listed
from keeplora.progress import Track
from keeplora.studies.doctor.findings import FAILURES, Finding, Level
from keeplora.studies.doctor.image_fingerprints import Prints, fingerprint

MOST_IMBALANCE = 10  # A larger ratio of the largest class to the smallest one is worth a warning.
DARK = 16  # An image whose colours are all below this, of 255, shows next to nothing.
TINY = 4  # Images whose shorter side is this many times below the model's input hold little that the model could see.

CODE = r"[a-zA-Z]{0,3}[-_ ]?\d+"
TRANSPARENT = "an alpha channel, put on white"


@dataclass(frozen=True, slots=True)
class Look:
    """What one image showed."""

    index: int
    size: tuple[int, int] = (0, 0)
    losses: tuple[str, ...] = ()  # What of it does not reach the model.
    error: str = ""
    print: Prints | None = None  # Its fingerprint, if it was decoded.
    brightest: int = 255  # The largest value of a colour, if it was decoded.


@dataclass
class TaskData:
    """The splits of one task as far as they could be read, and what their images showed."""

    spec: TaskSpec
    splits: dict[str, Examples] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # How many images, or conversations, a split has.
    is_accepted: bool = False  # Whether a run would accept the splits.
    looks: dict[str, list[Look]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)  # A few of them.
    exact: int = 0  # How many held-out images are in the training split too, pixel by pixel.
    alike: int = 0  # How many others look like one there.

    @property
    def num_images(self) -> int:
        """How many images, or conversations, are read."""
        return sum(self.sizes.values())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes as the prompts have them."""
        stored = self.splits["train"].class_names if "train" in self.splits else ()
        if self.is_accepted:
            return stored
        return tuple(self.spec.class_names.get(name, name.replace("_", " ")) for name in stored)

    @property
    def class_sizes(self) -> Counter[str]:
        """How many training images each class has."""
        if (train := self.splits.get("train")) is None:
            return Counter()
        counts = Counter(train.labels)
        return Counter({name: counts[label] for label, name in enumerate(train.class_names)})


def examine_data(data: TaskData, evaluation: str, side: int, track: Track, *, decode: bool) -> Iterator[Finding]:
    """Read a task into `data` and look at all its images; what a run would refuse is a problem each.

    `side` is the width of the model's input, 0 if unknown. Without `decode` only the images' headers are read.
    """
    problems: list[tuple[str, str]] = []
    try:
        if any(isinstance(read, Conversations) for read in stored_splits(data.spec).values()):
            read = read_conversations(data.spec, evaluation)
            data.sizes, data.is_accepted = dict(zip(("train", evaluation), map(len, read), strict=True)), True
            return  # A record is checked when it is made ready for the model, whose chat format it takes.
        data.splits, problems = examine_splits(data.spec, evaluation)
    except FAILURES as error:
        problems = [(str(error), "")]
    data.sizes = {split: len(examples) for split, examples in data.splits.items()}
    data.is_accepted = not problems
    yield from (Finding("problem", data.spec.name, message, cure) for message, cure in problems)
    for split, examples in data.splits.items():
        # Pillow lets other threads run while it decodes.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looks = pool.map(partial(_look, examples, decode), range(len(examples)))
            data.looks[split] = list(track(looks, f"{data.spec.name}: looking at {split}", len(examples)))
        yield from _image_findings(data, split, side)
    if data.is_accepted:
        yield from _balance_findings(data)


def _look(examples: Examples, decode: bool, index: int) -> Look:
    try:
        with examples.load(index) as image:
            size, losses = image.size, _losses(image)
            if not decode:
                image.verify()
        if not decode:
            return Look(index, size, losses)
        seen = examples.image(index)
        brightest = max(high for _, high in cast(Any, seen.getextrema()))
        return Look(index, size, losses, print=fingerprint(seen), brightest=brightest)
    except (*UNREADABLE_IMAGE, Image.DecompressionBombError) as error:
        message, origin = str(error), examples.origin(index)
        return Look(index, error=message if origin in message else f"{origin} ({message})")


def _losses(image: Image.Image) -> tuple[str, ...]:
    # The further frames of other formats are no pictures of their own.
    is_animated = image.format in ("GIF", "WEBP", "PNG", "TIFF") and getattr(image, "is_animated", False)
    losses = {
        "greys of 16 or 32 bits, cut to 8": image.mode.startswith("I"),
        TRANSPARENT: image.has_transparency_data,
        "CMYK colours, turned to RGB without their profile": image.mode == "CMYK",
        "several frames, of which only the first is used": is_animated,
    }
    return tuple(loss for loss, is_lost in losses.items() if is_lost)


def _image_findings(data: TaskData, split: str, side: int) -> Iterator[Finding]:
    examples, readable = data.splits[split], [look for look in data.looks[split] if not look.error]
    # The messages end with the same cure each.
    if errors := [look.error.split("; replace")[0] for look in data.looks[split] if look.error]:
        message = f"{counted(len(errors), 'image')} of {split} cannot be read: {listed(errors, separator='; ')}"
        yield Finding("problem", data.spec.name, message, "replace or remove each")
    if examples.left_out:
        message = f"{counted(len(examples.left_out), 'file')} of {split} left out: {listed(examples.left_out)}"
        yield Finding("warning", data.spec.name, message, "convert what is an image; remove or ignore the rest")
    if dark := [look.index for look in readable if look.brightest < DARK]:
        message = f"{counted(len(dark), 'image')} of {split} are nearly black, such as {examples.origin(dark[0])}"
        yield Finding("warning", data.spec.name, message, "look at them; was their range lost when they were saved?")
    for loss in dict.fromkeys(loss for look in readable for loss in look.losses):
        losing = [look.index for look in readable if loss in look.losses]
        message = f"{counted(len(losing), 'image')} of {split} with {loss}, such as {examples.origin(losing[0])}"
        level: Level = "note" if loss == TRANSPARENT else "warning"
        cure = "" if level == "note" else "convert them yourself, to see what the model sees"
        yield Finding(level, data.spec.name, message, cure)
    if small := [look for look in readable if min(look.size) < side]:
        smallest = min(small, key=lambda look: min(look.size))
        width, height = smallest.size
        which = f"{len(small):,} of {counted(len(readable), 'image')} of {split} are smaller than the model's"
        least = f"the smallest is {width} x {height}: {examples.origin(smallest.index)}"
        message = f"{which} {side} x {side} and are enlarged; {least}"
        is_tiny = min(width, height) * TINY < side
        yield Finding("warning" if is_tiny else "note", data.spec.name, message, "find larger ones" if is_tiny else "")


def _balance_findings(data: TaskData) -> Iterator[Finding]:
    if not (sizes := data.class_sizes.most_common()):
        yield Finding("problem", data.spec.name, "train has no class", "add images at SPLIT/CLASS/IMAGE")
        return
    (largest, most), (smallest, fewest) = sizes[0], sizes[-1]
    if len(sizes) == 1:
        message = f"{largest!r} is the only class: every answer is right, and there is nothing to learn"
        yield Finding("problem", data.spec.name, message, "add a second class")
    if len(codes := [name for name in data.class_names if re.fullmatch(CODE, name)]) > len(data.class_names) / 2:
        message = f"class names look like codes, which the model cannot read: {listed(codes, 5)}"
        yield Finding("warning", data.spec.name, message, "give the words for the prompt with class_names")
    if most > MOST_IMBALANCE * fewest:
        many, few = f"{largest!r} has {counted(most, 'image')}", f"{smallest!r} {fewest:,}"
        message = f"the classes of train are out of balance: {many}, {few}, {most / fewest:.0f} times fewer"
        cure = "add images of the rare classes, or expect them to be mistaken for the frequent ones"
        yield Finding("warning", data.spec.name, message, cure)
