"""What a terminal shows: progress with the time left, a live table of scores, accuracy matrices, errors."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.report.html import METRIC_NAMES
from keeplora.runs.export.card import Card
from keeplora.studies.compare.intervals import COSTS, SCORES, Comparison, Estimate
from keeplora.studies.principal import PrincipalCurve, title_of

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0

WIDTH = 78
"""Columns that every terminal is taken to have."""

HEADLINE = ("transfer", "average", "last")


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


def score_table(runs: list[Results]) -> Table:
    """Tabulate the current score of every task, a column for each run, with the metrics below."""
    table = Table(title=f"Accuracy in % on {escape(Path(runs[0].benchmark).stem)} (bold: learned)")
    table.add_column("task")
    table.add_column("untouched", justify="right")
    for run in runs:
        table.add_column(f"{run.method}\n{len(run.accuracy)}/{len(run.tasks)}", justify="right")
    for i, task in enumerate(runs[0].tasks):
        cells = [_cell(run, i) for run in runs]
        table.add_row(escape(task), f"{runs[0].zero_shot[i]:.1f}", *cells, end_section=i + 1 == len(runs[0].tasks))
    for key in HEADLINE:
        table.add_row(METRIC_NAMES[key], "", *[_number(run.summary()[key]) for run in runs])
    return table


def evaluation_table(recorded: Results, recorded_on: str, scores: list[float], evaluated_on: str) -> Table:
    """Tabulate what a run recorded after its last finished task beside a new evaluation of its model."""
    table = Table(title=f"{recorded.method}: accuracy in %, {len(recorded.accuracy)} tasks learned")
    table.add_column("task")
    table.add_column(f"recorded\n({recorded_on})", justify="right")
    table.add_column(f"evaluated\n({evaluated_on})", justify="right")
    for task, before, now in zip(recorded.tasks, recorded.accuracy[-1], scores, strict=True):
        table.add_row(escape(task), f"{before:.1f}", f"{now:.1f}")
    return table


def matrix_table(run: Results) -> Table:
    """Tabulate a run's accuracy matrix: after each task (rows) on each task (columns)."""
    summary = ", ".join(f"{METRIC_NAMES[key]} {_number(run.summary()[key])}" for key in METRIC_NAMES)
    table = Table(
        title=f"{run.method}: accuracy in %", caption=summary, box=None, padding=(0, 1, 0, 0), min_width=WIDTH
    )
    table.add_column("after learning", no_wrap=True)
    width = min(max(map(len, run.tasks)), max(4, (WIDTH - 15) // len(run.tasks) - 1))
    for task in run.tasks:
        table.add_column(escape(task), justify="right", width=width, overflow="ellipsis", no_wrap=True)
    table.add_row("(untouched)", *[f"{score:.0f}" for score in run.zero_shot])
    for t, row in enumerate(run.accuracy):
        cells = [f"[bold]{score:.0f}[/]" if i == t else f"{score:.0f}" for i, score in enumerate(row)]
        table.add_row(escape(run.tasks[t]), *cells)
    return table


def principal_table(curve: PrincipalCurve) -> Table:
    """Tabulate the mean accuracy with only the principal, and only the residual, directions of the weights."""
    caption = (
        f"untouched {fmean(curve.untouched):.1f}, chance {fmean(curve.chance):.1f}; mean of {len(curve.tasks)} tasks"
    )
    table = Table(title=f"{escape(title_of(curve))} in %", caption=caption)
    for heading in ("energy kept", "directions kept\n(of the width)", "principal\nonly", "residual\nonly"):
        table.add_column(heading, justify="right")
    for point in curve.points:
        scores = (f"{fmean(point.principal):.1f}", f"{fmean(point.residual):.1f}")
        table.add_row(f"{100 * point.share:g} %", f"{100 * point.width:.1f} %", *scores)
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tabulate every method's scores with their 95 % intervals, the differences to the reference, and the costs."""
    seeds, orders = comparison.config["seeds"], comparison.config["orders"]
    benchmark, reference = escape(Path(comparison.config["benchmark"]).stem), comparison.config["reference"]
    means = _score_grid(f"{benchmark}: {seeds} seeds, {orders} order(s), mean ± 95 % interval, in %")
    means.add_column("runs", justify="right", no_wrap=True)
    less = _score_grid(f"less {reference}, by seed and order (bold: the interval excludes 0)")
    costs = Table(title="Costs: mean ± 95 % interval", caption="added: parameters at inference, after all tasks")
    for name in ("method", "parameters trained a task", "added", "seconds a task", "MiB"):
        costs.add_column(name, justify="left" if name == "method" else "right")
    for method in comparison.methods:
        scores = [_estimate(comparison.score(method, key)) for key in SCORES]
        means.add_row(method, *scores, comparison.num_runs(method))
        if method != reference:
            less.add_row(method, *[_estimate(comparison.difference(method, key), signed=True) for key in SCORES])
        trained, added, seconds, memory = (comparison.cost(method, key) for key in COSTS)
        costs.add_row(method, f"{trained:,.0f}", f"{added:,.0f}", f"{seconds:.1f}", f"{memory:,.0f}")
    return [means, less, costs] if reference in comparison.methods and less.row_count else [means, costs]


def export_lines(card: Card, folder: Path) -> list[str]:
    """Say what was exported, what was left out, and what was lost by cutting to a rank."""
    names = card.results.tasks
    learned = len(card.results.accuracy)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    lines = [f"Exported {learned} of {len(names)} tasks to {escape(str(folder))}: {card.format}, {size:,.1f} MiB"]
    if left := ", ".join(names[learned:]):
        lines.append(f"[bold yellow]The run is not finished;[/] not in the export: {escape(left)}")
    if card.cut is not None:
        worst = card.cut.worst
        lines.append(
            f"Cut to rank {card.cut.rank}: relative error {100 * card.cut.overall:.3g} % over all layers,"
            f" {100 * card.cut.errors[worst]:.3g} % in the worst, {escape(worst)}"
        )
    return lines


def _score_grid(title: str) -> Table:
    table = Table(title=title, padding=(0, 0, 0, 1))
    table.add_column("method", no_wrap=True)
    for key in SCORES:
        table.add_column(METRIC_NAMES[key], justify="right", no_wrap=True)
    return table


def _estimate(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return f"[bold]{text}[/]" if signed and value.excludes_zero else text


def _cell(run: Results, i: int) -> str:
    if not run.accuracy:
        return ""
    text = f"{run.accuracy[-1][i]:.1f}"
    return f"[bold]{text}[/]" if i < len(run.accuracy) else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
