"""How the library shows progress: it hands what it goes through to a function, which may draw a bar."""

from collections.abc import Callable, Iterable
from typing import Any

Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Wraps an iterable to show progress, given what is being done and how many items there are, if known."""


def silent(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """Show no progress."""
    return items
