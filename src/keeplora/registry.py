"""Registries: dictionaries by name that this package fills, and that others can add to."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TypeVar

T = TypeVar("T")

_LOADED: dict[str, None] = {}


class Registry(dict[str, T]):
    """Things of one kind by name. Add one with `@REGISTRY.register("name")`, or as to any dictionary."""

    def __init__(self, kind: str, known: dict[str, T] | None = None) -> None:
        super().__init__(known or {})
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds what it decorates under a name, unless the name is taken."""

        def add(thing: T) -> T:
            if self.setdefault(name, thing) != thing:
                raise ValueError(f"two things are registered as the {self.kind} {name!r}; rename one")
            return thing

        return add

    def find(self, name: str) -> T:
        """Return what has a name, here or in another package, or raise a `ValueError` that lists the known names."""
        if name not in self:
            load_extensions()
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}; known {self.kind}s: {', '.join(self)}")
        return self[name]

    def names(self) -> Iterator[str]:
        """Yield all names, those that other packages bring too."""
        load_extensions()
        yield from self


def load_extensions() -> None:
    """Load all packages' entry points of the group `keeplora`, once each: what they import may register itself."""
    for point in entry_points(group="keeplora"):
        if point.value not in _LOADED:
            _LOADED[point.value] = None
            point.load()
