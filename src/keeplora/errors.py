"""What can go wrong that is nobody's mistake in the code, and how a message names many things."""

from collections.abc import Sequence


class LearningError(ValueError):
    """A task could not be learned with these settings: training diverged, or nothing is left to learn with."""


class InUseError(ValueError):
    """Another process writes to the folder."""


def listed(names: Sequence[str], most: int = 20, *, separator: str = ", ") -> str:
    """Return names in one line, the first ones and how many there are more."""
    shown = separator.join(names[:most])
    return f"{shown}{separator}and {len(names) - most} more" if len(names) > most else shown


def printable(text: str) -> str:
    """Return text from elsewhere with all escaped that could steer a terminal, or turn the direction of letters."""
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
