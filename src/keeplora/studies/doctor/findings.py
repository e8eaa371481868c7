"""What the doctor says: findings of three levels, each with what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["problem", "warning", "note"]

LEVELS: tuple[Level, ...] = ("problem", "warning", "note")
"""A problem stops a run or spoils it; a warning makes its numbers doubtful; a note is good to know."""

MOST_NAMED = 20


@dataclass(frozen=True)
class Finding:
    """One thing that was found, with its task ("" for the whole run) and its cure ("" where there is none to name)."""

    level: Level
    task: str
    message: str
    cure: str = ""


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings by their level; those that say the same of several tasks become one."""
    tasks: dict[tuple[Level, str, str], dict[str, None]] = {}
    for found in findings:
        tasks.setdefault((found.level, found.message, found.cure), {})[found.task] = None
    joined = [Finding(level, ", ".join(names), message, cure) for (level, message, cure), names in tasks.items()]
    return sorted(joined, key=lambda found: LEVELS.index(found.level))


def listed(names: Sequence[str], most: int = MOST_NAMED, *, separator: str = ", ") -> str:
    """Return names in one line, the first ones and how many there are more."""
    shown = separator.join(names[:most])
    return f"{shown}{separator}and {len(names) - most} more" if len(names) > most else shown


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def without_task(error: Exception, task: str) -> str:
    """Return an error's message without the name of the task, which stands beside it already."""
    return str(error).removeprefix(f"task {task!r}: ")
