"""What a terminal shows while a command works: the scores so far above a bar with the time left."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from keeplora.cli.tables import score_table
from keeplora.evaluation.accuracy_matrix import Results

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0


class Display(Live):
    """A live table of the runs so far above a progress bar; without a terminal, lines, and the table at the end."""

    def __init__(self, console: Console) -> None:
        self.runs: dict[str, Results] = {}
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
        self.progress = Progress(TextColumn("{task.description}"), *columns, console=console)
        super().__init__(console=console, auto_refresh=console.is_terminal)
        transformers_logging.disable_progress_bar()  # Its bars would be drawn into ours, or between lines of a log.

    def get_renderable(self) -> RenderableType:
        """Return what rich shows now."""
        table = score_table(list(self.runs.values())) if self.runs else ""
        return Group(table, self.progress if self.console.is_terminal else "")  # The "" ends the table's last line.

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how far they are; without a terminal, in a line every minute."""
        bar = self.progress.add_task(description, total=total)
        start = last = time.monotonic()
        try:
            for number, item in enumerate(items, 1):
                yield item
                self.progress.advance(bar)
                now = time.monotonic()
                if not self.console.is_terminal and now - last > SECONDS_BETWEEN_LINES and number != total:
                    last = now
                    left = f"/{total}, {(now - start) / number * (total - number) / 60:.0f} min left" if total else ""
                    self.console.print(f"{description}: {number}{left}")
        finally:
            self.progress.remove_task(bar)

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
