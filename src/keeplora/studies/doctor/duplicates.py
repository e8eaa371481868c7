"""Images that are in two places: held-out ones among the training images, and one image under two labels."""

from collections.abc import Iterator

import numpy as np

from keeplora.errors import counted, listed
from keeplora.progress import Track
from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.findings import Finding, Level
from keeplora.studies.doctor.image_fingerprints import PRINT, Ints, alike_images, equal_images

USUAL_SHARE = 0.02
"""Up to this share of look-alikes is found between honest splits of simple pictures; more is worth a warning."""


class _Side:
    """The decoded images of one split of one task, as they are counted here."""

    def __init__(self, data: TaskData, split: str) -> None:
        self.data, self.task, self.examples = data, data.spec.name, data.splits[split]
        looks = [look for look in data.looks[split] if look.print is not None]
        self.indices = [look.index for look in looks]
        self.prints = np.array([look.print for look in looks], PRINT)

    def name(self, place: int) -> str:
        """Return where in its task an image comes from."""
        origin, path = self.examples.origin(self.indices[place]), self.data.spec.path
        return origin.removeprefix(f"task {self.task!r}: ").removeprefix(f"{path}/").removesuffix(f" of {path}")

    def label(self, place: int) -> str:
        """Return the class of an image."""
        return self.examples.class_names[self.examples.labels[self.indices[place]]]


def duplicate_findings(tasks: list[TaskData], evaluation: str, track: Track) -> Iterator[Finding]:
    """Compare held-out images with the training images of all tasks; each task's `exact` and `alike` are set."""
    trains, helds = ([_Side(data, split) for data in tasks if split in data.looks] for split in ("train", evaluation))
    for train in trains:
        yield from _twice_labelled(train)
    pairs = [(held, train) for held in helds for train in trains]
    for held, train in track(pairs, "comparing images", len(pairs)):
        yield from _shared(held, train, evaluation)


def _shared(held: _Side, train: _Side, evaluation: str) -> Iterator[Finding]:
    """Say which held-out images are among training images, as the very same or as look-alikes."""

    def named(found: Ints) -> list[str]:
        return [f"{held.name(place)} = {train.name(other)}" for place, other in enumerate(found) if other >= 0]

    equal = equal_images(held.prints, train.prints)
    exact, near = named(equal), named(np.where(equal < 0, alike_images(held.prints, train.prints), -1))
    is_own = held.data is train.data
    if is_own:
        held.data.exact, held.data.alike = len(exact), len(near)
    task, place = (held.task, "train") if is_own else ("", f"train of {train.task}")
    of = f"{counted(len(held.prints), 'image')} of {evaluation}" + ("" if is_own else f" of {held.task}")
    if exact:
        are = "is" if len(exact) == 1 else "are"
        message = f"{len(exact):,} of {of} {are} in {place} too, pixel by pixel: {_first_three(exact)}"
        cure = "remove them from one of the two; until then the score counts what was memorised"
        yield Finding("warning", task, f"LEAK: {message}", cure) if is_own else Finding("note", task, message)
    if near:
        level: Level = "warning" if is_own and len(near) > USUAL_SHARE * len(held.prints) else "note"
        look = "looks" if len(near) == 1 else "look"
        cure = "look at them; remove those that show the same picture" if is_own else ""
        yield Finding(level, task, f"{len(near):,} of {of} {look} like one in {place}: {_first_three(near)}", cure)


def _twice_labelled(train: _Side) -> Iterator[Finding]:
    """Say which training images have two labels, and how many are there more than once."""
    groups: dict[bytes, list[int]] = {}
    for place, digest in enumerate(train.prints["digest"].tolist()):
        groups.setdefault(digest, []).append(place)
    several = [places for places in groups.values() if len(places) > 1]
    if torn := [places for places in several if len({train.label(place) for place in places}) > 1]:
        named = [" = ".join(f"{train.name(place)} ({train.label(place)})" for place in places[:3]) for places in torn]
        message = f"{counted(len(torn), 'image')} of train with more than one label: {_first_three(named)}"
        yield Finding("warning", train.task, message, "keep each under its right label only")
    if extra := sum(len(places) - 1 for places in several):
        copies = counted(extra, "image of train is a copy", "images of train are copies")
        yield Finding("note", train.task, f"{copies} of another one, pixel by pixel")


def _first_three(names: list[str]) -> str:
    return listed(names, 3, separator="; ")
