"""How a terminal shows the certificates of a run, and the room that its layers have left."""

import math
from collections.abc import Iterator
from statistics import median

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keeplora.evaluation.capacity import MOST, Capacity, LayerCapacity, forecast
from keeplora.runs.verify import Proof, TaskProof
from keeplora.subspace.protected import LayerCertificate

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
