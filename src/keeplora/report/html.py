"""One self-contained HTML page about some runs: their metrics in a table, their accuracy matrices as heat maps."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.evaluation.capacity import Capacity, forecast
from keeplora.report.charts import capacity_map, heat_maps

TEMPLATES = Path(__file__).parent / "templates"


def page(runs: list[Results], capacity: Capacity | None = None) -> str:
    """Return the page of some runs of one benchmark; its pictures are inside it.

    Args:
        runs: Their results.
        capacity: The room that the first of them has left, if its method protects anything.
    """
    return render(
        "report.html.j2",
        runs=runs,
        metric_names=METRIC_NAMES,
        picture=base64.b64encode(heat_maps(runs)).decode(),
        room=base64.b64encode(capacity_map(capacity)).decode() if capacity else "",
        forecast=forecast(capacity) if capacity else "",
        number=lambda value: "-" if value is None else f"{value:.1f}",
    )


def render(template: str, **values: Any) -> str:
    """Return the page of a template of this folder; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)
