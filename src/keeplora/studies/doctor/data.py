"""Is the data of every task there, whole, and fit to learn from? All that is wrong is found, not only the first."""

from collections import Counter
from dataclasses import dataclass, field

from datasets.exceptions import DatasetsError

from keeplora.data.benchmark import TaskSpec
from keeplora.data.images import Examples
from keeplora.data.readers import READERS, read_splits
from keeplora.progress import Track
from keeplora.studies.doctor.findings import Finding, Level, counted, listed, without_task
from keeplora.studies.doctor.image_scan import LOSSY, Scan, scan

UNREADABLE_DATA = (ValueError, OSError, DatasetsError)
"""What a reader raises for data that is missing or damaged."""

MOST_IMBALANCE = 10
"""A larger ratio of the largest class to the smallest one is worth a warning."""

TINY = 4
"""Images whose shorter side is this many times below the model's input hold little that the model could see."""


@dataclass
class TaskData:
    """The splits of one task as far as they could be read, and what their images showed."""

    spec: TaskSpec
    evaluation: str
    splits: dict[str, Examples] = field(default_factory=dict)
    scans: dict[str, Scan] = field(default_factory=dict)
    is_arranged: bool = False
    """Whether a run would accept the splits."""
    exact: int = 0
    """How many held-out images are in the training split too, pixel by pixel."""
    alike: int = 0
    """How many others look like one there."""

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.spec.name

    @property
    def is_usable(self) -> bool:
        """Whether a run could read the task."""
        return self.is_arranged and not any(one.errors for one in self.scans.values())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes as the prompts have them."""
        train = self.splits.get("train")
        if train is None or self.is_arranged:
            return train.class_names if train else ()
        return tuple(self.spec.class_names.get(name, name) for name in train.class_names)

    def counts(self, split: str) -> Counter[str]:
        """Return how many images of a split each class has."""
        examples = self.splits[split]
        counts = Counter(dict.fromkeys(examples.class_names, 0))
        counts.update(examples.class_names[label] for label in examples.labels)
        return counts


def read_task(spec: TaskSpec, evaluation: str) -> tuple[TaskData, list[Finding]]:
    """Read the splits of a task that a run uses; what a run would refuse is a problem each."""
    data = TaskData(spec, evaluation)
    try:
        train, held_out = read_splits(spec, evaluation)
    except UNREADABLE_DATA as error:
        return data, _all_refusals(data, error)
    data.splits, data.is_arranged = {"train": train, evaluation: held_out}, True
    return data, []


def scan_task(data: TaskData, track: Track, *, decode: bool) -> None:
    """Look at every image of a task."""
    for split, examples in data.splits.items():
        data.scans[split] = scan(examples, track, f"{data.name}: looking at {split}", decode=decode)


def task_findings(data: TaskData, side: int | None) -> list[Finding]:
    """Say what is wrong or odd about the images and classes of a task.

    Args:
        data: The task, after `scan_task`.
        side: Width of the model's input, if it is known.
    """
    findings = []
    for split, seen in data.scans.items():
        findings += _image_findings(data.name, split, seen, data.splits[split], side)
    if data.is_arranged:
        findings += _balance_findings(data)
    return findings


def _all_refusals(data: TaskData, error: Exception) -> list[Finding]:
    """Name all that makes a run refuse the task, where `error` is the first of it."""
    spec, evaluation = data.spec, data.evaluation
    first = Finding("problem", spec.name, without_task(error, spec.name))
    if spec.reader not in READERS.names():
        return [first]
    try:
        splits = READERS.find(spec.reader)(spec)
    except UNREADABLE_DATA:
        return [first]
    data.splits = {name: splits[name] for name in ("train", evaluation) if name in splits}
    if "train" not in splits or (evaluation == "test" and "test" not in splits):
        return [first]
    problems = [(f"{len(classes)} classes are named {name!r}: {listed(classes)}", "their prompts must differ")
                for name, classes in _namesakes(data).items()]  # fmt: skip
    train = splits["train"].class_names
    if unknown := sorted(set(spec.class_names) - set(train)):
        cure = f"its classes are {listed(train)}"
        problems.append((f"class_names has {listed(unknown)}, which {spec.path} does not have", cure))
    if evaluation in splits and (only := sorted(set(splits[evaluation].class_names) - set(train))):
        problems.append((f"{evaluation} has classes that train does not have: {listed(only)}", "add images to train"))
    for split in data.splits:
        if empty := [name for name in train if data.counts(split)[name] == 0]:
            images = counted(len(empty), "class has no image", "classes have no image")
            problems.append((f"{images} in {split}: {listed(empty)}", "add some, or remove the class"))
    return [Finding("problem", spec.name, message, cure) for message, cure in problems] or [first]


def _namesakes(data: TaskData) -> dict[str, list[str]]:
    """Return the classes that share a name in the prompt, by that name."""
    found: dict[str, list[str]] = {}
    for stored, name in zip(data.splits["train"].class_names, data.class_names, strict=True):
        found.setdefault(name, []).append(stored)
    return {name: classes for name, classes in found.items() if len(classes) > 1}


def _image_findings(task: str, split: str, seen: Scan, examples: Examples, side: int | None) -> list[Finding]:
    findings = []
    prefix = f"task {task!r}: "
    if seen.errors:
        # The messages end with the same cure each.
        errors = [message.removeprefix(prefix).split("; replace or remove it")[0] for message in seen.errors]
        message = f"{counted(len(errors), 'image')} of {split} cannot be read: {listed(errors, separator='; ')}"
        findings.append(Finding("problem", task, message, "replace or remove each"))
    for loss, places in seen.losses.items():
        example = examples.origin(places[0]).removeprefix(prefix)
        message = f"{counted(len(places), 'image')} of {split} with {LOSSY[loss]}, such as {example}"
        level: Level = "note" if loss == "transparent" else "warning"
        cure = "" if level == "note" else "convert them yourself, to see what the model sees"
        findings.append(Finding(level, task, message, cure))
    small = [place for place, size in enumerate(seen.sizes) if side and min(size) < side]
    if side and small:
        smallest = min(small, key=lambda place: min(seen.sizes[place]))
        width, height = seen.sizes[smallest]
        example = examples.origin(seen.indices[smallest]).removeprefix(prefix)
        message = (
            f"{len(small):,} of {counted(len(seen.sizes), 'image')} of {split} are smaller than the model's"
            f" {side} x {side} and are enlarged; the smallest is {width} x {height}: {example}"
        )
        level = "warning" if min(width, height) * TINY < side else "note"
        findings.append(Finding(level, task, message, "find larger ones" if level == "warning" else ""))
    return findings


def _balance_findings(data: TaskData) -> list[Finding]:
    findings = []
    counts = data.counts("train")
    if len(counts) == 1:
        message = f"{next(iter(counts))!r} is the only class: every answer is right, and there is nothing to learn"
        findings.append(Finding("problem", data.name, message, "add a second class"))
    (largest, most), (smallest, fewest) = counts.most_common()[0], counts.most_common()[-1]
    if most > MOST_IMBALANCE * fewest:
        message = (
            f"the classes of train are out of balance: {largest!r} has {counted(most, 'image')}, {smallest!r}"
            f" {fewest:,}, {most / fewest:.0f} times fewer"
        )
        cure = "add images of the rare classes, or expect them to be mistaken for the frequent ones"
        findings.append(Finding("warning", data.name, message, cure))
    return findings
