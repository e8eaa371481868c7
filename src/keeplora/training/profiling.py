"""Seconds and peak memory of the phases of a run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

Costs = dict[str, dict[str, float]]  # Seconds and peak memory (MiB) of each phase, by its name.

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells a process's peak memory, and where it is asked to start it anew."""


class Clock:
    """Measures phases, without those within them: seconds, and the memory of the GPU, else of the whole process."""

    def __init__(self, before: Costs | None = None) -> None:
        self._phases: Costs = {name: dict(measured) for name, measured in (before or {}).items()}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside; a phase that comes again is continued."""
        self._book()
        self._running.append(name)
        try:
            yield
            self._book()
        finally:
            self._running.pop()
            self._start()

    def read(self) -> Costs:
        """Return what was measured so far, in the order in which the phases first ended or were interrupted."""
        self._book()
        return {name: dict(measured) for name, measured in self._phases.items()}

    def _book(self) -> None:
        """Write what passed since the last time to the innermost phase that is running."""
        if self._running:
            measured = self._phases.setdefault(self._running[-1], {"seconds": 0.0, "peak_memory_mb": 0.0})
            measured["seconds"] += time.perf_counter() - self._since
            measured["peak_memory_mb"] = max(measured["peak_memory_mb"], _peak_memory_mb())
        self._start()

    def _start(self) -> None:
        self._since = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            with suppress(OSError):  # Where it is there and closed, the peak is that of the process's whole life.
                CLEAR.write_text("5")


@contextmanager
def measured(phases: Costs, name: str) -> Iterator[None]:
    """Write the seconds and the peak memory of what runs inside to the phases."""
    clock = Clock()
    with clock.phase(name):
        yield
    phases |= clock.read()


def _peak_memory_mb() -> float:
    """Return the peak since `Clock._start`; systems other than Linux know only that of the process's whole life."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    if found := [line for line in lines if line.startswith("VmHWM")]:  # Some sandboxes' kernels leave it out.
        return int(found[0].split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
