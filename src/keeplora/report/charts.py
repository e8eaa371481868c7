"""Charts, as the bytes of PNG files: accuracy matrices, remaining capacity, methods against each other."""

import io
from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure

from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import Capacity
from keeplora.evaluation.intervals import Estimate

MOST_NAMES = 30  # A picture has the names of at most so many tasks, and grows no further with their number.
LONGEST_NAME = 24


def trade_off(points: Mapping[str, tuple[Estimate | None, Estimate | None]], reference: str) -> bytes:
    """Draw Last against Transfer (None: a line) of each method with 95 % intervals; the reference is a star."""
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(7.5, 5.5), layout="constrained", dpi=120)
        axis = figure.subplots()
        for index, (method, (transfer, last)) in enumerate(points.items()):
            color = matplotlib.colormaps["tab20"](index % 20)
            if last and transfer:
                x, y = transfer.mean, last.mean
                marker, size = ("*", 11) if method == reference else ("o", 6)
                axis.errorbar(x, y, last.half_width, transfer.half_width, marker, ms=size, color=color, capsize=2)
                axis.annotate(method, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
            elif last:
                axis.axhline(last.mean, color=color, ls="--", lw=1)
                axis.annotate(method, (0.01, last.mean), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axis.set(xlabel="Transfer in %: tasks before they are learned", ylabel="Last in %: all tasks at the end")
        axis.margins(x=0.12)
        return png(figure)


def heat_maps(runs: list[Results]) -> bytes:
    """Draw the accuracy matrix of every run, side by side on one colour scale.

    Rows are states of the model, from the untouched one down; columns are tasks. A frame marks the entry right after a
    task was learned: left and below of it is memory, right and above transfer.
    """
    num_tasks = len(runs[0].tasks)
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}):
        step = 1 + (num_tasks - 1) // MOST_NAMES
        side = 1.4 + 0.42 * min(num_tasks, MOST_NAMES)
        figure = Figure(figsize=(1.2 + side * len(runs), 1.0 + side), layout="constrained", dpi=110)
        axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        for axis, run in zip(axes, runs, strict=True):
            rows = [run.zero_shot, *run.accuracy]
            axis.imshow(rows, vmin=0, vmax=100, cmap="viridis", aspect="equal")
            axis.set(title=run.method, xlabel="evaluated on")
            names = [shortened(name) for name in ("(untouched)", *run.tasks)]
            axis.set_xticks(range(0, num_tasks, step), names[1::step], rotation=60, ha="right")
            axis.set_yticks(range(0, len(rows), step), names[: len(rows) : step])
            for t, row in enumerate(rows):
                for i, score in enumerate(row if step == 1 else ()):
                    color = "white" if score < 60 else "black"
                    axis.text(i, t, f"{score:.0f}", ha="center", va="center", color=color, fontsize=7)
                if t > 0:
                    axis.add_patch(
                        matplotlib.patches.Rectangle((t - 1.5, t - 0.5), 1, 1, fill=False, ec="red", lw=1.2 / step)
                    )
        axes[0].set_ylabel("after learning")
        figure.colorbar(axes[0].images[0], ax=axes, label="accuracy in %", shrink=0.6)
        return png(figure)


def capacity_map(capacity: Capacity) -> bytes:
    """Draw the share of the input dimensions that is free in each layer (rows) after each task (columns)."""
    names = list(capacity.layers)
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}):
        tasks, across = capacity.tasks, 1 + (len(capacity.tasks) - 1) // MOST_NAMES
        size = (4.5 + 0.35 * min(len(tasks), MOST_NAMES), 1.4 + min(0.14 * len(names), 30.0))
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        axis = figure.subplots()
        shares = [[100 * left / layer.d_in for left in layer.left] for layer in capacity.layers.values()]
        image = axis.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_xticks(range(0, len(tasks), across), map(shortened, tasks[::across]), rotation=60, ha="right")
        step = 1 + len(names) // 200
        axis.set_yticks(range(0, len(names), step), names[::step], fontsize=6)
        axis.set_xlabel("after learning")
        figure.colorbar(image, ax=axis, label="input dimensions free, in %")
        return png(figure)


def shortened(name: str) -> str:
    """Return a name as it fits beside a picture."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, without a margin; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
