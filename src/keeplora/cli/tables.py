"""Tables of a terminal: scores, matrices, comparisons, certificates, remaining capacity."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.evaluation.capacity import MOST, Capacity, LayerCapacity, forecast
from keeplora.evaluation.intervals import Estimate
from keeplora.runs.config import RunConfig
from keeplora.runs.export.card import Card
from keeplora.runs.verify import Proof, TaskProof
from keeplora.studies.compare.comparison import COSTS, SCORES, Comparison
from keeplora.studies.principal import PrincipalCurve, title_of
from keeplora.subspace.certificate import LayerCertificate

WIDTH = 78
"""Columns that every terminal is taken to have."""

HEADLINE = ("transfer", "average", "last")


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


def settings_table(config: RunConfig) -> Table:
    """Tabulate every setting of a run with its source; what somebody chose is bold."""
    table = Table(title="Settings of the run", box=None, padding=(0, 2, 0, 0))
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for name, (value, source) in config.settings.items():
        shown = escape(str(value))
        table.add_row(name, shown if source == "default" else f"[bold]{shown}[/]", escape(source))
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


BAR = 16
"""Width of a bar in characters."""


def proof_lines(proof: Proof, *, layers: bool) -> Iterator[RenderableType]:
    """Yield what to print of a proof: the tasks or all their layers, what was compared, the room, and the breaches.

    Args:
        proof: What was checked.
        layers: Show every layer, not only the worst one of each task.
    """
    yield f"{proof.method}: tasks finished: {len(proof.tasks)}, files with a hash: {proof.num_files}"
    if proof.tasks:
        yield _layer_table(proof) if layers and proof.protects else task_table(proof)
    if proof.tasks and not proof.protects and any(task.is_checked for task in proof.tasks):
        yield f"{proof.method} protects nothing: there is no leak to measure, only hashes and the merged model"
    if proof.protects and proof.leak_allowed >= 1:
        yield "The options let `a` be trained, which promises no bound on the leak: it is shown, not judged"
    if proof.merge_error is not None:
        difference = f"differs by at most {proof.merge_error:.2g} from" if proof.merge_error else "is, bit by bit,"
        yield f"Merged model: {difference} the base model with all updates"
    for note in proof.notes:
        yield f"Note: {escape(note)}"
    if (capacity := proof.capacity) is not None:
        yield from gauge_lines(capacity)
    for breach in proof.breaches:
        yield f"[bold red]breach:[/] [red]{escape(breach)}[/]"
    yield "[bold red]NOT certified[/]" if proof.breaches else "[bold green]certified[/]: no breach was found"


def task_table(proof: Proof) -> Table:
    """Tabulate the worst of each task: a row for each, with the layer whose update leaks most."""
    table = _table("layer of the largest leak")
    for task in proof.tasks:
        if not task.is_checked:
            table.add_row(escape(task.name), "[red]cannot be checked[/]", *[""] * 5)
        elif not task.layers:
            table.add_row(escape(task.name), "-", *[""] * 5)
        else:
            name, worst = max(task.layers.items(), key=lambda item: item[1].leak)
            table.add_row(escape(task.name), escape(name), *_cells(worst, list(task.layers.values())))
    return table


def _layer_table(proof: Proof) -> Table:
    table = _table("layer")
    for task in proof.tasks:
        _add_layers(table, task)
    return table


def _add_layers(table: Table, task: TaskProof) -> None:
    if not task.is_checked:
        table.add_row(escape(task.name), "[red]cannot be checked[/]", *[""] * 5, end_section=True)
    for number, (name, layer) in enumerate(task.layers.items(), 1):
        is_last = number == len(task.layers)
        table.add_row(escape(task.name), escape(name), *_cells(layer, [layer]), end_section=is_last)


def _table(layer: str) -> Table:
    table = Table(title="Certificates, measured anew", padding=(0, 1, 0, 0), box=None)
    table.add_column("task", no_wrap=True)
    table.add_column(layer, overflow="fold")
    for heading in ("leak", "orthonormality", "free", "protected", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _cells(leaking: LayerCertificate, layers: list[LayerCertificate]) -> list[str]:
    """Return the columns of a row: the leak of one layer, the worst of all layers in the others."""
    return [
        f"{leaking.leak:.1e}",
        f"{max(layer.orthonormality for layer in layers):.1e}",
        str(min(layer.residual_dims for layer in layers)),
        str(max(layer.protected_dims for layer in layers)),
        _range([layer.rank for layer in layers]),
    ]


def gauge_lines(capacity: Capacity) -> Iterator[RenderableType]:
    """Yield what to print of the room left: a table with a bar for each kind of layer, and the forecast."""
    title = f"Room left after {len(capacity.tasks)} task{'s' if len(capacity.tasks) > 1 else ''}"
    table = Table(
        title=title, caption="free: in the fullest layer; a task: the most one takes", padding=(0, 1, 0, 0), box=None
    )
    for heading in ("layers", "free", "", "median", "a task", "tasks left"):
        table.add_column(heading, justify="left" if heading in ("layers", "") else "right", no_wrap=True)
    kinds = capacity.by_kind()
    names = _short_names(list(kinds))
    for kind, rooms in kinds.items():
        fullest = min(rooms, key=lambda room: room.share)
        table.add_row(
            escape(names[kind]) + (f" ({len(rooms)})" if len(rooms) > 1 else ""),
            f"{fullest.left[-1]}/{fullest.d_in}",
            _bar(fullest),
            f"{100 * median(room.share for room in rooms):.0f} %",
            _taken(rooms),
            _fitting(rooms),
        )
    yield table
    yield escape(forecast(capacity))


def _short_names(kinds: list[str]) -> dict[str, str]:
    """Return the first and the last part of each name, or the whole where these do not tell them apart."""
    short = {kind: " ".join(dict.fromkeys((kind.split(".")[0], kind.split(".")[-1]))) for kind in kinds}
    return short if len(set(short.values())) == len(kinds) else {kind: kind for kind in kinds}


def _bar(room: LayerCapacity) -> Text:
    """Draw the share of a layer that is free; red where the rank finds no room, yellow where it is less than twice."""
    filled = math.ceil(BAR * room.share)
    color = "red" if room.left[-1] < room.rank else "yellow" if room.left[-1] < 2 * room.rank else "green"
    return Text("━" * filled, style=color) + Text("─" * (BAR - filled), style="dim")


def _taken(rooms: list[LayerCapacity]) -> str:
    added = [room.added for room in rooms if room.added is not None]
    return f"{max(added):.1f}" if added else "?"


def _fitting(rooms: list[LayerCapacity]) -> str:
    tasks = [room.full_rank_tasks for room in rooms if room.full_rank_tasks is not None]
    if len(tasks) < len(rooms):
        return "?"
    return f"> {MOST}" if min(tasks) > MOST else f"{min(tasks):.0f}"


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"
