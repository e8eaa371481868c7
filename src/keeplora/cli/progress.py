"""What a terminal shows: progress with the time left, a live table of scores, accuracy matrices, errors."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keeplora.cli.tables import score_table
from keeplora.evaluation.accuracy_matrix import Results

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0


class Display:
    """A live table of the runs so far above a progress bar. Its `track` and `watch` are what a run calls."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.runs: dict[str, Results] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
        )
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the display while the body runs; without a terminal, print the table at the end."""
        if self.console.is_terminal:
            with self.live:
                yield
        else:
            yield
            self.console.print(self._table())

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how far they are; without a terminal, in a line every minute."""
        if not self.console.is_terminal:
            yield from self._track_in_lines(items, description, total)
            return
        bar = self.progress.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self.progress.advance(bar)
        finally:
            self.progress.remove_task(bar)

    def _track_in_lines(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        start = last = time.monotonic()
        for number, item in enumerate(items, 1):
            yield item
            if (now := time.monotonic()) - last > SECONDS_BETWEEN_LINES and number != total:
                last = now
                left = f"/{total}, {(now - start) / number * (total - number) / 60:.0f} min left" if total else ""
                self.console.print(f"{description}: {number}{left}")

    def watch(self, results: Results) -> None:
        """Take up a run's results so far; without a terminal, say so in a line."""
        self.runs[results.method] = results
        if self.console.is_terminal:
            return
        finished = len(results.accuracy)
        state = f"after {results.tasks[finished - 1]}" if finished else "untouched"
        scores = results.accuracy[-1] if finished else results.zero_shot
        self.console.print(
            f"{results.method}: {finished}/{len(results.tasks)} tasks, {state}: mean accuracy"
            f" {sum(scores) / len(scores):.1f} %"
        )

    def _render(self) -> RenderableType:
        return Group(self._table(), self.progress)

    def _table(self) -> RenderableType:
        return score_table(list(self.runs.values())) if self.runs else ""
