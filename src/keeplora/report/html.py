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
    """Return the page of runs of one benchmark, with its pictures inside; `capacity` is that of the first run."""
    drawings = {"heat_maps": heat_maps, "capacity_map": capacity_map, "forecast": forecast}
    return render("report.html.j2", runs=runs, capacity=capacity, metric_names=METRIC_NAMES, **drawings)


def render(template: str, **values: Any) -> str:
    """Return the page of a template of this folder; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["shown"] = lambda value, spec="": "-" if value is None else format(value, spec)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return environment.get_template(template).render(**values)
