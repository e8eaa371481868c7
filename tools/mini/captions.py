"""Concepts and captions: what each pre-training drawing may be called, and how often it is shown."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import classes, drawings, names
from .wording import ANIMAL_MOUSE, GROUPS, INTERFACE, RICH


@dataclass
class Bank:
    """Drawings kept for pre-training: source row, chance of being shown, and the caption names each may have."""

    rows: np.ndarray
    weights: np.ndarray
    labels: list[list[int]]
    concepts: list[tuple[str, str]]


def class_names(names_of: dict[str, list[str]], code_of: dict[str, str]) -> dict[str, str]:
    """Return the cleaned name of each emoji that shows a task's class -> the class name."""
    found = {}
    for task in classes.EMOJI_TASKS.values():
        for label, shorts in task.items():
            for short in shorts.split():
                code = code_of[names.squash(short)]
                found.update({names.clean(name): label for name in [*names_of.get(code, []), short] if name})
    return found


def split_group(name: str) -> tuple[str, str]:
    """Return group and bare name: 'flag of japan' -> ('flag', 'japan')."""
    for prefix, group in (
        ("letter ", "letter"),
        ("digit ", "digit"),
        ("script ", "script"),
        ("flag of ", "flag"),
        ("flag for flag ", "flag"),
    ):
        bare = name.removeprefix(prefix)
        known = {"letter": classes.LETTERS, "digit": classes.DIGITS, "script": classes.SCRIPTS}.get(group)
        if name.startswith(prefix) and (known is None or bare in known):
            return group, bare
    return "thing", name


def spoken_names(source: str, found: list[str], class_of: dict[str, str], common: set[str]) -> list[str]:
    """Return the names a drawing may be called by, class names of tasks first; none if it is not worth showing."""
    every = list(dict.fromkeys(found))
    if source not in ANIMAL_MOUSE:
        every = ["computer mouse" if name == "mouse" else name for name in every]
    words = every[0].split()
    if source == "openclipart":
        every = [every[0], *[name for name in every[1:] if name in common]]
    if split_group(every[0])[0] == "thing" and len(words) > 1:
        tails = [names.SYNONYMS.get(tail, tail) for tail in (" ".join(words[-2:]), words[-1])]
        every += [
            tail for tail in tails if (tail in common and tail not in {"mouse", "dog"}) or every[0].endswith("ing dog")
        ]
    if source not in RICH | {"latin", "scripts"} and (INTERFACE & set(words) or re.fullmatch(r"[\d ]+", every[0])):
        return []
    mapped = [class_of[name] for name in every if name in class_of]
    every = list(dict.fromkeys([*mapped, *every]))
    return [name for name in every if len(name) > 1 and len(name.split()) <= 4]


def build(sources: list[str], found: list[list[str]], removed: np.ndarray, class_of: dict[str, str]) -> Bank:
    """Return the bank of all drawings but the removed ones; rare names of interface sets are dropped."""
    common = {name for source, every in zip(sources, found, strict=True) if source == "google" for name in every}
    spoken = [spoken_names(source, every, class_of, common) for source, every in zip(sources, found, strict=True)]
    frequency = Counter(name for every in spoken for name in every)
    concepts: dict[tuple[str, str], int] = {}
    rows, labels = [], []
    for row, (_source, every) in enumerate(zip(sources, spoken, strict=True)):
        kept = [name for name in every if frequency[name] >= 4 or name in common or split_group(name)[0] != "thing"]
        if kept and not removed[row]:
            rows.append(row)
            labels.append([concepts.setdefault(split_group(name), len(concepts)) for name in kept[:4]])
    bank = Bank(np.array(rows), np.zeros(len(rows)), labels, list(concepts))
    bank.weights = show_weights(bank, class_of, common)
    return bank


def show_weights(bank: Bank, class_of: dict[str, str], common: set[str]) -> np.ndarray:
    """Return the chance of each drawing: its group's share, split over concepts by interest, then over drawings.

    Among things, the classes of tasks count 24, other emoji 2, the rest 1 (times the root of the number of drawings).
    """
    boosted = set(class_of.values()) | set(classes.FASHION) | set(classes.SILHOUETTES)
    first = np.array([every[0] for every in bank.labels])
    members: dict[int, int] = Counter(first.tolist())
    raw: dict[str, dict[int, float]] = defaultdict(dict)
    for concept, size in members.items():
        group, name = bank.concepts[concept]
        if group == "thing":
            interest = 24.0 if name in boosted else 2.0 if name in common else 1.0
            raw[group][concept] = interest * min(max(size, 16 if name in boosted else 1), 40) ** 0.5
        else:
            raw[group][concept] = 3.0 if name in classes.FLAGS.values() else 1.0
    share = {}
    for group, by_concept in raw.items():
        total = sum(by_concept.values())
        share.update({concept: GROUPS[group][0] * value / total for concept, value in by_concept.items()})
    weights = np.array([share[concept] / members[concept] for concept in first])
    return weights / weights.sum()


def captions(bank: Bank) -> tuple[list[str], np.ndarray]:
    """Return every caption text and its concept `[number]`."""
    texts, owner = [], []
    for concept, (group, name) in enumerate(bank.concepts):
        templates = GROUPS[group][1]
        texts += [template.format(name) for template in templates]
        owner += [concept] * len(templates)
    return texts, np.array(owner)


def related(bank: Bank) -> np.ndarray:
    """Return `[concepts, concepts] bool`: pairs of which one's words contain the other's, never used as negatives."""
    words = [set(name.split()) for _, name in bank.concepts]
    vocabulary = {word: n for n, word in enumerate(sorted(set().union(*words)))}
    hot = np.zeros((len(words), len(vocabulary)), np.float32)
    for row, every in enumerate(words):
        hot[row, [vocabulary[word] for word in every]] = 1
    overlap = hot @ hot.T
    smaller = np.minimum(hot.sum(1)[:, None], hot.sum(1)[None])
    group = np.array([group for group, _ in bank.concepts])
    return (overlap >= smaller) & (group[:, None] == group[None])


def source_rows(folder: Path, order: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return source and names of every drawing, in the order of `order`."""
    sources, found = [], []
    for source in order:
        drawn = drawings.load(folder, source)
        sources += [source] * len(drawn.names)
        found += drawn.names
    return sources, found
