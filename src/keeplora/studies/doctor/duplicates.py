"""Images that are in two places: held-out ones among the training images, and one image under two labels."""

from collections import defaultdict
from dataclasses import dataclass

from keeplora.progress import Track
from keeplora.studies.doctor.data import TaskData
from keeplora.studies.doctor.findings import Finding, Level, counted, listed
from keeplora.studies.doctor.image_fingerprints import Prints, alike_images, equal_images

MOST_PAIRS_NAMED = 3

USUAL_SHARE = 0.02
"""Up to this share of look-alikes is found between honest splits of simple pictures; more is worth a warning."""


@dataclass(frozen=True)
class _Side:
    """The readable images of one split of one task."""

    data: TaskData
    split: str

    @property
    def prints(self) -> Prints:
        return self.data.scans[self.split].prints

    def name(self, place: int) -> str:
        """Return where in its task the image at a place of `prints` comes from."""
        index, path = self.data.scans[self.split].indices[place], str(self.data.spec.path)
        origin = self.data.splits[self.split].origin(index).removeprefix(f"task {self.data.name!r}: ")
        return origin.removeprefix(f"{path}/").removesuffix(f" of {path}")

    def label(self, place: int) -> str:
        """Return the class of the image at a place of `prints`."""
        examples = self.data.splits[self.split]
        return examples.class_names[examples.labels[self.data.scans[self.split].indices[place]]]


def duplicate_findings(tasks: list[TaskData], evaluation: str, track: Track) -> list[Finding]:
    """Compare every held-out image with every training image, of its own task and of the others.

    Writes into each task how many of its held-out images are in its training split.
    """
    trains = [_Side(data, "train") for data in tasks if "train" in data.scans]
    helds = [_Side(data, evaluation) for data in tasks if evaluation in data.scans]
    findings = [finding for train in trains for finding in _twice_labelled(train)]
    pairs = [(held, train) for held in helds for train in trains]
    for held, train in track(pairs, "comparing images", len(pairs)):
        if not len(held.prints) or not len(train.prints):
            continue
        equal = equal_images(held.prints, train.prints)
        alike = alike_images(held.prints, train.prints)
        exact = [(place, int(other)) for place, other in enumerate(equal) if other >= 0]
        near = [(place, int(other)) for place, other in enumerate(alike) if other >= 0 and equal[place] < 0]
        findings += _shared(held, train, exact, near)
    return findings


def _shared(held: _Side, train: _Side, exact: list[tuple[int, int]], near: list[tuple[int, int]]) -> list[Finding]:
    """Say which held-out images are among training images, as the very same or as look-alikes."""
    is_own = held.data is train.data
    if is_own:
        held.data.exact, held.data.alike = len(exact), len(near)
    of = held.split if is_own else f"{held.split} of {held.data.name}"
    place = "train" if is_own else f"train of {train.data.name}"
    task = held.data.name if is_own else ""
    findings = []
    if exact:
        message = f"LEAK: {_share(exact, held)} of {of} {_are(exact)} in {place} too, pixel by pixel: "
        cure = "remove them from one of the two; until then the score counts what was memorised"
        level: Level = "warning" if is_own else "note"
        message = message if is_own else message.removeprefix("LEAK: ")
        findings.append(Finding(level, task, message + _named(exact, held, train), cure if is_own else ""))
    if near:
        level = "warning" if is_own and len(near) > USUAL_SHARE * len(held.prints) else "note"
        look = "looks" if len(near) == 1 else "look"
        message = f"{_share(near, held)} of {of} {look} like one in {place}: {_named(near, held, train)}"
        cure = "look at them; remove those that show the same picture" if is_own else ""
        findings.append(Finding(level, task, message, cure))
    return findings


def _share(pairs: list[tuple[int, int]], held: _Side) -> str:
    return f"{len(pairs):,} of {counted(len(held.prints), 'image')}"


def _are(pairs: list[tuple[int, int]]) -> str:
    return "is" if len(pairs) == 1 else "are"


def _named(pairs: list[tuple[int, int]], held: _Side, train: _Side) -> str:
    named = [f"{held.name(place)} = {train.name(other)}" for place, other in pairs]
    return listed(named, MOST_PAIRS_NAMED, separator="; ")


def _twice_labelled(train: _Side) -> list[Finding]:
    """Say which training images have two labels, and how many are there more than once."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for place, digest in enumerate(train.prints.digests):
        groups[digest].append(place)
    several = [places for places in groups.values() if len(places) > 1]
    torn = [places for places in several if len({train.label(place) for place in places}) > 1]
    findings = []
    if torn:
        named = [" = ".join(f"{train.name(place)} ({train.label(place)})" for place in places[:3]) for places in torn]
        message = f"{counted(len(torn), 'image')} of train with more than one label: "
        message += listed(named, MOST_PAIRS_NAMED, separator="; ")
        findings.append(Finding("warning", train.data.name, message, "keep each under its right label only"))
    if extra := sum(len(places) - 1 for places in several):
        copies = counted(extra, "image of train is a copy", "images of train are copies")
        findings.append(Finding("note", train.data.name, f"{copies} of another one, pixel by pixel"))
    return findings
