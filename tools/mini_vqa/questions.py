"""Questions with one short answer, and the forms that they share: options, yes or no, places."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from PIL import Image

from .canvas import SIZE

LETTERS = "abcd"
BY_LETTER = "answer with the option's letter."
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Question:
    """A question, its answer, and which kind of question it is."""

    text: str
    answer: str
    kind: str


@dataclass
class Picture:
    """An image (none: words alone), what can be asked about it, and what tells its content from another's."""

    image: Image.Image | None
    questions: list[Question] = field(default_factory=list)
    key: tuple[object, ...] = ()
    description: str = ""  # What of it can be said in words: enough for the kinds that are named `told`.
    told: tuple[str, ...] = ()

    def ask(self, kind: str, text: str, answer: object) -> None:
        """Add a question."""
        self.questions.append(Question(text, str(answer), kind))


def share_of(key: tuple[object, ...], parts: int) -> int:
    """Return which of `parts` equal parts of all contents this one belongs to, the same everywhere."""
    return int(hashlib.md5(repr(key).encode(), usedforsecurity=False).hexdigest()[:8], 16) % parts


def options(rng: Random, text: str, right: str, wrong: Sequence[str], number: int | None = None) -> tuple[str, str]:
    """Return the question with options behind it, and the letter of the right one."""
    others = [one for one in dict.fromkeys(wrong) if one != right]
    rng.shuffle(others)
    chosen = [right, *others[: (number or rng.choice((2, 3, 4))) - 1]]
    rng.shuffle(chosen)
    listed = " ".join(f"{letter}. {one}" for letter, one in zip(LETTERS, chosen, strict=False))
    return f"{text} {listed} {BY_LETTER}", LETTERS[chosen.index(right)]


def one_of(rng: Random, text: str, right: str, wrong: Sequence[str]) -> str:
    """Return the question with the answer and one or two others behind it: `what color is it, red or blue?`."""
    others = [one for one in dict.fromkeys(wrong) if one != right]
    chosen = [right, *rng.sample(others, min(len(others), rng.choice((1, 1, 2))))]
    rng.shuffle(chosen)
    return f"{text.rstrip('?')}, {', '.join(chosen[:-1])} or {chosen[-1]}?"


def place_of(x: float, y: float) -> str:
    """Return the part of the picture, of nine, in which a point lies."""
    side = "left" if x < SIZE / 3 else "right" if x > 2 * SIZE / 3 else ""
    height = "top" if y < SIZE / 3 else "bottom" if y > 2 * SIZE / 3 else ""
    return f"{height} {side}".strip() or "center"


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    known = {"cross": "crosses", "bus": "buses", "person": "people", "food": "foods", "cherries": "cherries"}
    return known.get(noun, f"{noun}s")


def article(noun: str) -> str:
    """Return the noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
