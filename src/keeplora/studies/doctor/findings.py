"""What the doctor says: findings of three levels, each with what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from datasets.exceptions import DatasetsError

Level = Literal["problem", "warning", "note"]
"""A problem stops a run or spoils it; a warning makes its numbers doubtful; a note is good to know."""

FAILURES = (ValueError, OSError, DatasetsError, torch.OutOfMemoryError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What data, a model or a method raise when they cannot be used; our own mistakes raise something else."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found, with its task ("" for the whole run) and its cure ("" where there is none to name)."""

    level: Level
    task: str
    message: str
    cure: str = ""


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings by their level, one for all tasks that it is the same for; no message repeats its task's name."""
    tasks: dict[tuple[Level, str, str], dict[str, None]] = {}
    for found in findings:
        message = found.message.replace(f"task {found.task!r}: ", "")
        tasks.setdefault((found.level, message, found.cure), {})[found.task] = None
    joined = [Finding(level, ", ".join(names), message, cure) for (level, message, cure), names in tasks.items()]
    return sorted(joined, key=lambda found: get_args(Level).index(found.level))
