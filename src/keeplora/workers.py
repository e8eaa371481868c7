"""Many runs on the cores of one machine, each in a process that keeps its images from one run to the next."""

import contextlib
import logging
import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
from transformers.utils import logging as transformers_logging

from keeplora.collect import Track
from keeplora.models.pixels import kept
from keeplora.results import Results
from keeplora.run import RunConfig, run
from keeplora.task import LearningError

Outcome = Results | str
"""What a run gave: its results, or why it could not learn."""

_PROCESS = contextlib.ExitStack()
"""What a worker process holds until it ends."""


class Workers:
    """Makes runs, some at the same time, in processes that live as long as the `with` block; one job needs none.

    Each of several jobs computes on its share of the cores. Results do not depend on which process made a run.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
        self._stack = contextlib.ExitStack()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.jobs == 1:
            self._stack.enter_context(kept())
        else:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_start, initargs=(threads,))
            self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run_all(self, configs: list[RunConfig], track: Track, what: str) -> list[Outcome]:
        """Make every run that is not finished yet; return what each gave, in the given order.

        Raises:
            ValueError: If a configuration or the data is wrong, or a process was killed.
        """
        if self._pool is None:
            return [_outcome(config) for config in track(configs, what, len(configs))]
        futures = [self._pool.submit(_outcome, config) for config in configs]
        try:
            for future in track(as_completed(futures), what, len(futures)):
                future.result()
        except BrokenProcessPool:
            raise ValueError("a run's process ended from outside, perhaps for lack of memory; try --jobs 1") from None
        return [future.result() for future in futures]


def silence_libraries() -> None:
    """Stop what transformers prints beside our own progress, and a warning that no user can do anything about."""
    transformers_logging.disable_progress_bar()
    # peft asks transformers by a name that transformers is about to drop.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def _start(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    silence_libraries()
    logging.disable(logging.WARNING)  # What a run warns of stands in its certificates too.
    _PROCESS.enter_context(kept())


def _end_with_parent() -> None:
    """End this process when the one that started it was killed: its runs could not be gone on with otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(config: RunConfig) -> Outcome:
    try:
        return run(config)
    except LearningError as error:
        return str(error)
