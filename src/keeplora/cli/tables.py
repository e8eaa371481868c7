"""Tables of a terminal: scores, matrices, comparisons, certificates, remaining capacity."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keeplora.errors import printable
from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.evaluation.capacity import MOST, Capacity, LayerCapacity, forecast
from keeplora.evaluation.intervals import Estimate
from keeplora.runs.config import RunConfig
from keeplora.runs.export import Card
from keeplora.runs.verify import Proof
from keeplora.studies.compare.comparison import COSTS, SCORES, Comparison
from keeplora.studies.principal import PrincipalCurve

WIDTH = 78  # Columns that every terminal is taken to have.
BAR = 16  # Width of a bar in characters.

MOST_COLUMNS = 12  # More tasks do not fit side by side.
LONG = ("task", "untouched", "right after", "at the end")
MEASURED = ("merge_loss", "orthonormality")
WITHOUT_LINES: dict[str, Any] = {"box": None, "padding": (0, 1, 0, 0)}
Row = Iterable[object]
Rows = Iterable[Row]


def table(title: str, headings: Row, rows: Rows, *, left: int = 1, no_wrap: bool = False, **style: Any) -> Table:
    """Make a table of rich, with `left` columns to the left and the others to the right; no word in it is markup."""
    made = Table(title=escape(title), **style)
    for number, heading in enumerate(headings):
        made.add_column(_text(heading), justify="left" if number < left else "right", no_wrap=no_wrap)
    for cells in rows:
        made.add_row(*map(_text, cells))
    return made


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(str(cell)))


def score_table(runs: list[Results]) -> Table:
    """Tabulate the current score of every task, a column for each run, with the metrics below."""
    tasks, untouched = runs[0].tasks, runs[0].zero_shot
    headings = ("task", "untouched", *(f"{run.method}\n{len(run.accuracy)}/{len(run.tasks)}" for run in runs))
    rows = [(tasks[i], f"{score:.1f}", *(_score(run.accuracy, i) for run in runs)) for i, score in enumerate(untouched)]
    made = table(f"Accuracy in % on {runs[0].benchmark} (bold: learned)", headings, rows)
    made.add_section()
    for key in ("transfer", "average", "last"):
        made.add_row(METRIC_NAMES[key], "", *(_number(run.summary()[key]) for run in runs))
    return made


def _score(accuracy: list[list[float]], i: int) -> Text:
    return Text(f"{accuracy[-1][i]:.1f}", "bold" if i < len(accuracy) else "") if accuracy else Text()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def settings_table(config: RunConfig) -> Table:
    """Tabulate every setting of a run with its source; what somebody chose is bold."""
    rows = [
        (name, Text(str(value), "" if source == "default" else "bold"), source)
        for name, (value, source) in config.settings.items()
    ]
    headings = ("setting", "value", "from")
    made = table("Settings of the run", headings, rows, left=3, box=None, padding=(0, 2, 0, 0))
    for column in made.columns:
        column.overflow = "fold"
    return made


def evaluation_table(
    title: str, tasks: list[str], recorded: tuple[str, list[float]], now: tuple[str, list[float]]
) -> Table:
    """Tabulate the scores that were recorded beside those of a new evaluation, each with the split they are of."""
    rows = [(task, f"{old:.1f}", f"{new:.1f}") for task, old, new in zip(tasks, recorded[1], now[1], strict=True)]
    headings = ("task", f"recorded\n({recorded[0]})", f"evaluated\n({now[0]})")
    return table(f"{title}: accuracy in %", headings, rows)


def matrix_table(run: Results) -> Table:
    """Tabulate a run's accuracy matrix: after each task (rows) on each task (columns); of a long one what it shows."""
    caption = ", ".join(f"{METRIC_NAMES[key]} {_number(value)}" for key, value in run.summary().items())
    if len(run.tasks) > MOST_COLUMNS:
        learned = [f"{row[t]:.1f}" for t, row in enumerate(run.accuracy)] + ["-"] * len(run.tasks)
        ends = zip(run.tasks, run.zero_shot, learned, [run.zero_shot, *run.accuracy][-1], strict=False)
        rows_of_tasks = [(task, f"{before:.1f}", after, f"{now:.1f}") for task, before, after, now in ends]
        made = table(f"{run.method}: accuracy in %", LONG, rows_of_tasks, caption=caption, **WITHOUT_LINES)
        made.columns[0].overflow, made.columns[0].max_width = "ellipsis", WIDTH - 40
        return made
    rows: list[Row] = [("(untouched)", *(f"{score:.0f}" for score in run.zero_shot))]
    for t, row in enumerate(run.accuracy):
        rows.append((run.tasks[t], *(Text(f"{score:.0f}", "bold" if i == t else "") for i, score in enumerate(row))))
    title, headings = f"{run.method}: accuracy in %", ("after learning", *run.tasks)
    made = table(title, headings, rows, no_wrap=True, caption=caption, min_width=WIDTH, **WITHOUT_LINES)
    for column in made.columns[1:]:
        column.width = min(max(map(len, run.tasks)), max(4, (WIDTH - 15) // len(run.tasks) - 1))
    return made


def probe_lines(run: Results) -> Iterator[str]:
    """Yield a line for each probe: what the model could do before, at its worst, and at the end."""
    for name, scores in run.probes.items():
        worst = f", at worst {min(scores):.1f}" if min(scores) < min(scores[0], scores[-1]) else ""
        yield f"Probe {escape(name)}: untouched {scores[0]:.1f}{worst}, now {scores[-1]:.1f}"


def principal_table(curve: PrincipalCurve) -> Table:
    """Tabulate the mean accuracy with only the principal, and only the residual, directions of the weights."""
    headings = ("energy kept", "directions kept\n(of the width)", "principal\nonly", "residual\nonly")
    rows = [
        (f"{100 * p.share:g} %", f"{100 * p.width:.1f} %", f"{fmean(p.principal):.1f}", f"{fmean(p.residual):.1f}")
        for p in curve.points
    ]
    untouched, chance = fmean(curve.untouched), fmean(curve.chance)
    caption = f"untouched {untouched:.1f}, chance {chance:.1f}; mean of {len(curve.tasks)} tasks"
    return table(f"{curve.title} in %", headings, rows, left=0, caption=caption)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Tabulate every method's scores with their 95 % intervals, the differences to the reference, and the costs."""
    config, methods, reference = comparison.config, comparison.methods, comparison.config["reference"]
    means = [(name, *_estimates(comparison.score, name), comparison.num_runs(name)) for name in methods]
    less = [(name, *_estimates(comparison.difference, name, "+.2f")) for name in methods if name != reference]
    costs = [(name, *(format(comparison.score(name, key), spec) for key, spec in COSTS.items())) for name in methods]
    benchmark, headings = Path(config["benchmark"]).stem, ("method", *SCORES.values())
    title = f"{benchmark}: {config['seeds']} seeds, {config['orders']} order(s), mean ± 95 % interval, in %"
    tables = [table(title, (*headings, "runs"), means, no_wrap=True, padding=(0, 0, 0, 1))]
    if reference in methods and less:
        title = f"less {reference}, by seed and order (bold: the interval excludes 0)"
        tables.append(table(title, headings, less, no_wrap=True, padding=(0, 0, 0, 1)))
    headings = ("method", "parameters trained a task", "added", "seconds a task", "MiB")
    caption = "added: parameters at inference, after all tasks"
    return [*tables, table("Costs: mean ± 95 % interval", headings, costs, caption=caption)]


def _estimates(estimate: Callable[[str, str], Estimate | None], method: str, spec: str = ".2f") -> Iterator[Text]:
    """Yield the estimates of a method's scores; signed ones are bold where the interval excludes 0."""
    for value in (estimate(method, key) for key in SCORES):
        is_bold = value is not None and "+" in spec and value.excludes_zero
        yield Text("-" if value is None else format(value, spec), "bold" if is_bold else "")


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
    return [*lines, f"Card: {escape(str(folder / 'README.md'))}"]


def proof_lines(proof: Proof, *, layers: bool) -> Iterator[RenderableType]:
    """Yield what to print of a proof: the worst layer of each task or all, what was compared, capacity, breaches."""
    yield f"{proof.method}: tasks finished: {len(proof.tasks)}, files with a hash: {proof.num_files}"
    if proof.tasks:
        yield _certificate_table(proof, layers=layers and proof.protects)
    if proof.tasks and not proof.protects and any(task.is_checked for task in proof.tasks):
        yield f"{proof.method} protects nothing: there is no leak to measure, only hashes and the merged model"
    if proof.protects and proof.leak_allowed >= 1:
        yield "The options let `a` be trained, which promises no bound on the leak: it is shown, not judged"
    if proof.merge_error is not None:
        difference = f"differs by at most {proof.merge_error:.2g} from" if proof.merge_error else "is, bit by bit,"
        yield f"Merged model: {difference} the base model with all updates"
    for note in proof.notes:
        yield f"Note: {escape(note)}"
    yield from capacity_lines(proof.capacity)
    for breach in proof.breaches:
        yield f"[bold red]breach:[/] [red]{escape(breach)}[/]"
    if proof.breaches:
        yield "[bold red]NOT certified[/]"
    elif not proof.tasks:
        yield "[bold yellow]nothing to certify yet[/]: no task is finished"
    else:
        yield "[bold green]certified[/]: no breach was found"


def _certificate_table(proof: Proof, *, layers: bool) -> Table:
    """Tabulate all layers of each task, or the layer that leaks most beside the worst of all in the other columns."""
    rows: list[Row] = []
    for task in proof.tasks:
        groups = [{name: layer} for name, layer in task.layers.items()] if layers else [task.layers]
        for group in filter(None, groups):
            name, worst = max(group.items(), key=lambda item: item[1].leak)
            lost, orthonormality = (max(getattr(layer, key) for layer in group.values()) for key in MEASURED)
            free = min(layer.residual_dims for layer in group.values())
            protected = max(layer.protected_dims for layer in group.values())
            ranks = sorted({layer.rank for layer in group.values()})
            rank = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else ranks[0]
            measured = (f"{value:.1e}" for value in (worst.leak, lost, orthonormality))
            rows.append((task.name, name, *measured, free, protected, rank))
        if not task.layers:
            rows.append((task.name, "-" if task.is_checked else Text("cannot be checked", "red")))
    layer = "layer" if layers else "layer of the largest leak"
    headings = ("task", layer, "leak", "lost", "orthonormality", "free", "protected", "rank")
    made = table("Certificates, measured anew", headings, rows, left=2, no_wrap=True, **WITHOUT_LINES)
    made.columns[1].no_wrap, made.columns[1].overflow = False, "fold"
    return made


def capacity_lines(capacity: Capacity | None) -> Iterator[RenderableType]:
    """Yield what to print of the remaining capacity: a table with a bar for each kind of layer, and the estimate."""
    if capacity is None:
        return
    kinds = capacity.by_kind()
    short = {kind: " ".join(dict.fromkeys((kind.split(".")[0], kind.split(".")[-1]))) for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}  # First and last part do not tell them apart.
    title = f"Remaining capacity after {len(capacity.tasks)} task{'s' if len(capacity.tasks) > 1 else ''}"
    headings = ("layers", "free", "", "median", "a task", "tasks left")
    rows = [_capacity_row(short[kind], layers) for kind, layers in kinds.items()]
    caption = "free: in the fullest layer; a task: the most one takes"
    yield table(title, headings, rows, no_wrap=True, caption=caption, **WITHOUT_LINES)
    yield escape(forecast(capacity))


def _capacity_row(name: str, layers: list[LayerCapacity]) -> Row:
    """Return the cells of a kind of layer; the bar is red without capacity for the rank, yellow for less than twice."""
    fullest = min(layers, key=lambda layer: layer.share)
    free, filled = fullest.left[-1], math.ceil(BAR * fullest.share)
    color = "red" if free < fullest.rank else "yellow" if free < 2 * fullest.rank else "green"
    added = [layer.added for layer in layers if layer.added is not None]
    tasks = [layer.full_rank_tasks for layer in layers if layer.full_rank_tasks is not None]
    fewest = f"> {MOST}" if tasks and min(tasks) > MOST else f"{min(tasks, default=0):.0f}"
    return (
        f"{name} ({len(layers)})" if len(layers) > 1 else name,
        f"{free}/{fullest.d_in}",
        Text("━" * filled, style=color) + Text("─" * (BAR - filled), style="dim"),
        f"{100 * median(layer.share for layer in layers):.0f} %",
        f"{max(added):.1f}" if added else "?",
        fewest if len(tasks) == len(layers) else "?",
    )
