"""Many runs on the cores of one machine, each in a process that keeps its images from one run to the next."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Self

import torch
from transformers.utils import logging as transformers_logging

from keeplora.data.cache import MEMORY_LIMIT, kept
from keeplora.errors import LearningError
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.progress import Track
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run

Outcome = Results | str  # What a run gave: its results, or why it could not learn.
_PROCESS = contextlib.ExitStack()  # What a worker process holds until it ends.


class Workers(contextlib.ExitStack):
    """Makes runs, some at the same time, in processes that live as long as the `with` block; one job needs none.

    Results do not depend on which process made a run, but in the last bits on the number of jobs, which share the
    cores.
    """

    def __init__(self, jobs: int | None = None) -> None:
        super().__init__()
        self.jobs = jobs or (1 if torch.cuda.is_available() else _num_cores())
        self.threads = torch.get_num_threads() if self.jobs == 1 else max(1, _num_cores() // self.jobs)
        self._others = multiprocessing.active_children()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.jobs == 1:
            self.enter_context(kept())
            return self
        context, shares = multiprocessing.get_context("spawn"), (self.threads, MEMORY_LIMIT // self.jobs)
        self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_start, initargs=shares)
        self.callback(self._pool.shutdown, cancel_futures=True)
        self.push(self._end_on_error)  # Before the shutdown, which waits.
        return self

    def _end_on_error(self, kind: type[BaseException] | None, *error: object) -> None:
        for process in set(multiprocessing.active_children()).difference(self._others) if kind else ():
            process.terminate()

    def run_all(self, configs: list[RunConfig], track: Track, what: str) -> list[Outcome]:
        """Make every run that is not finished yet; return what each gave, in the given order.

        An error that leaves the `with` block ends the processes; wrong data or a killed process is a ValueError.
        """
        if self._pool is None:
            return [_outcome(config) for config in track(configs, what, len(configs))]
        try:
            futures = [self._pool.submit(_outcome, config) for config in configs]
            for future in track(as_completed(futures), what, len(futures)):
                future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a run's process ended from outside, perhaps for lack of memory: try --jobs 1. A script that"
                ' compares needs `if __name__ == "__main__":` around what it does'
            ) from None
        return [future.result() for future in futures]


def _num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(threads: int, memory_limit: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    # peft asks transformers by a name that transformers is about to drop.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    logging.disable(logging.WARNING)  # What a run warns of stands in its certificates too.
    _PROCESS.enter_context(kept(memory_limit))


def _end_with_parent() -> None:
    """End this process when its parent was killed: no other process could resume its runs otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(config: RunConfig) -> Outcome:
    try:
        return run(config)
    except LearningError as error:
        return str(error)
    except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        return f"{type(error).__name__}: {error}"
