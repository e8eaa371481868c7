"""Is the data of every task there, whole, and fit to learn from? All that is wrong is found, not only the first."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import Examples
from keeplora.data.readers import examine_splits
from keeplora.errors import counted, listed
from keeplora.progress import Track
from keeplora.studies.doctor.findings import Finding, Level, noting_failure, without_task
from keeplora.studies.doctor.image_scan import TRANSPARENT, Look, look_at

MOST_IMBALANCE = 10
"""A larger ratio of the largest class to the smallest one is worth a warning."""

TINY = 4
"""Images whose shorter side is this many times below the model's input hold little that the model could see."""


@dataclass
class TaskData:
    """The splits of one task as far as they could be read, and what their images showed."""

    spec: TaskSpec
    splits: dict[str, Examples] = field(default_factory=dict)
    is_accepted: bool = False
    """Whether a run would accept the splits."""
    looks: dict[str, list[Look]] = field(default_factory=dict)
    exact: int = 0
    """How many held-out images are in the training split too, pixel by pixel."""
    alike: int = 0
    """How many others look like one there."""

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.spec.name

    @property
    def num_images(self) -> int:
        """How many images are read."""
        return sum(map(len, self.splits.values()))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes as the prompts have them."""
        stored = self.splits["train"].class_names if "train" in self.splits else ()
        return stored if self.is_accepted else tuple(self.spec.class_names.get(name, name) for name in stored)

    @property
    def class_sizes(self) -> Counter[str]:
        """How many training images each class has."""
        if "train" not in self.splits:
            return Counter()
        counts = Counter(self.splits["train"].labels)
        return Counter({name: counts[label] for label, name in enumerate(self.splits["train"].class_names)})

    def origin(self, split: str, index: int) -> str:
        """Say where an image of a split comes from."""
        return without_task(self.splits[split].origin(index), self.name)


def examine_data(data: TaskData, evaluation: str, side: int, track: Track, *, decode: bool) -> Iterator[Finding]:
    """Read a task into `data` and look at all its images; what a run would refuse is a problem each.

    `side` is the width of the model's input, 0 if it is not known. Without `decode` only the images' headers are read.
    """
    failures: list[Finding] = []
    with noting_failure(failures, data.name):
        data.splits, problems = examine_splits(data.spec, evaluation)
        data.is_accepted = not problems
        failures += [Finding("problem", data.name, message, cure) for message, cure in problems]
    yield from failures
    for split, examples in data.splits.items():
        data.looks[split] = look_at(examples, track, f"{data.name}: looking at {split}", decode=decode)
        yield from _image_findings(data, split, side)
    if data.is_accepted:
        yield from _balance_findings(data)


def _image_findings(data: TaskData, split: str, side: int) -> Iterator[Finding]:
    readable = [look for look in data.looks[split] if not look.error]
    # The messages end with the same cure each.
    errors = [without_task(look.error, data.name).split("; replace")[0] for look in data.looks[split] if look.error]
    if errors:
        message = f"{counted(len(errors), 'image')} of {split} cannot be read: {listed(errors, separator='; ')}"
        yield Finding("problem", data.name, message, "replace or remove each")
    for loss in dict.fromkeys(loss for look in readable for loss in look.losses):
        losing = [look.index for look in readable if loss in look.losses]
        message = f"{counted(len(losing), 'image')} of {split} with {loss}, such as"
        level: Level = "note" if loss == TRANSPARENT else "warning"
        cure = "" if level == "note" else "convert them yourself, to see what the model sees"
        yield Finding(level, data.name, f"{message} {data.origin(split, losing[0])}", cure)
    if small := [look for look in readable if min(look.size) < side]:
        smallest = min(small, key=lambda look: min(look.size))
        width, height = smallest.size
        message = (
            f"{len(small):,} of {counted(len(readable), 'image')} of {split} are smaller than the model's"
            f" {side} x {side} and are enlarged; the smallest is {width} x {height}:"
            f" {data.origin(split, smallest.index)}"
        )
        is_tiny = min(width, height) * TINY < side
        yield Finding("warning" if is_tiny else "note", data.name, message, "find larger ones" if is_tiny else "")


def _balance_findings(data: TaskData) -> Iterator[Finding]:
    sizes = data.class_sizes.most_common()
    (largest, most), (smallest, fewest) = sizes[0], sizes[-1]
    if len(sizes) == 1:
        message = f"{largest!r} is the only class: every answer is right, and there is nothing to learn"
        yield Finding("problem", data.name, message, "add a second class")
    if most > MOST_IMBALANCE * fewest:
        message = (
            f"the classes of train are out of balance: {largest!r} has {counted(most, 'image')}, {smallest!r}"
            f" {fewest:,}, {most / fewest:.0f} times fewer"
        )
        cure = "add images of the rare classes, or expect them to be mistaken for the frequent ones"
        yield Finding("warning", data.name, message, cure)
