"""One self-contained HTML page about some runs: their metrics in a table, their accuracy matrices as heat maps."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from keeplora.evaluation.accuracy_matrix import METRIC_NAMES, Results
from keeplora.evaluation.capacity import Capacity, forecast
from keeplora.report.charts import capacity_map, heat_maps

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Answered:
    """A test question with its answer, and what was answered to it."""

    task: str
    question: str
    expected: str
    image: str  # WebP as base64; "" where the question has none.
    given: Mapping[str, str]  # By the name of the model or the method.


def page(runs: list[Results], capacity: Capacity | None = None, answers: Sequence[Answered] = ()) -> str:
    """Return the page of runs of one benchmark, with its pictures inside; `capacity` is that of the first run.

    `answers` are questions that a generative model was asked, each with the same columns of given answers.
    """
    drawings = {"heat_maps": heat_maps, "capacity_map": capacity_map, "forecast": forecast}
    values = {"runs": runs, "capacity": capacity, "answers": answers}
    return render("report.html.j2", metric_names=METRIC_NAMES, **values, **drawings)


def compared(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return every setting of some runs, by the name of the run, with its value in each; those that differ first."""
    names = dict.fromkeys(key for settings in columns.values() for key in settings)
    rows = [(name, [_plain(settings.get(name, "")) for settings in columns.values()]) for name in names]
    return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _plain(value: Any) -> str:
    parts = [f"{key} {one}" for key, one in value.items()] if isinstance(value, dict) else value
    return ", ".join(map(str, parts)) if isinstance(parts, list | tuple) else str(parts)


def render(template: str, **values: Any) -> str:
    """Return the page of a template of this folder; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.globals["compared"] = compared
    environment.filters["shown"] = lambda value, spec="": "-" if value is None else format(value, spec)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    return environment.get_template(template).render(**values)
