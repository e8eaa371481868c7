"""Seconds and peak memory of the phases of a run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

Phases = dict[str, dict[str, float]]
"""Seconds and peak memory (MiB) of each phase, by its name."""

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells a process's peak memory, and where it is asked to start it anew."""


@contextmanager
def measured(phases: Phases, name: str) -> Iterator[None]:
    """Record the seconds and the peak memory of what runs inside.

    The memory is the GPU's where there is one, otherwise that of the whole process, its libraries included.
    """
    start = time.perf_counter()
    _start_peak()
    yield
    phases[name] = {"seconds": time.perf_counter() - start, "peak_memory_mb": _peak_memory_mb()}


def _start_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")


def _peak_memory_mb() -> float:
    """Return the peak since `_start_peak`; systems other than Linux know only that of the process's whole life."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():
        lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:  # Some sandboxes' kernels leave it out.
            return int(lines[0].split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
