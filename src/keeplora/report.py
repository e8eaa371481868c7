"""One self-contained HTML page about some runs: their metrics in a table, their accuracy matrices as heat maps."""

import base64
import io
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from keeplora.manifest import write_atomically
from keeplora.results import Results

TEMPLATE = Path(__file__).with_name("report.html.j2")

METRIC_NAMES = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
}
"""The metrics of `Results.summary`, as the tables head them."""


def write_report(runs: list[Results], path: Path) -> None:
    """Write the page of some runs to a file."""
    write_atomically(path, page(runs).encode())


def page(runs: list[Results]) -> str:
    """Return the page of some runs of one benchmark; its pictures are inside it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        runs=runs,
        metric_names=METRIC_NAMES,
        picture=base64.b64encode(heat_maps(runs)).decode(),
        number=lambda value: "-" if value is None else f"{value:.1f}",
    )


def heat_maps(runs: list[Results]) -> bytes:
    """Draw the accuracy matrix of every run, side by side on one colour scale; return a PNG.

    A row is a state of the model, from the untouched one down to the last task learned; a column is a task. A frame
    marks the entry right after a task was learned: left and below of it is memory, right and above transfer.
    """
    num_tasks = len(runs[0].tasks)
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False}):
        side = 1.4 + 0.42 * num_tasks
        figure = Figure(figsize=(1.2 + side * len(runs), 1.0 + side), layout="constrained", dpi=110)
        axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        image = None
        for axis, run in zip(axes, runs, strict=True):
            rows = [run.zero_shot, *run.accuracy]
            image = axis.imshow(rows, vmin=0, vmax=100, cmap="viridis", aspect="equal")
            axis.set_title(run.method)
            axis.set_xticks(range(num_tasks), run.tasks, rotation=60, ha="right")
            axis.set_yticks(range(len(rows)), ["(untouched)", *run.tasks[: len(rows) - 1]])
            axis.set_xlabel("evaluated on")
            for t, row in enumerate(rows):
                for i, score in enumerate(row):
                    color = "white" if score < 60 else "black"
                    axis.text(i, t, f"{score:.0f}", ha="center", va="center", color=color, fontsize=7)
                if t > 0:
                    axis.add_patch(matplotlib.patches.Rectangle((t - 1.5, t - 0.5), 1, 1, fill=False, ec="red", lw=1.2))
        axes[0].set_ylabel("after learning")
        if image is not None:
            figure.colorbar(image, ax=axes, label="accuracy in %", shrink=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()
