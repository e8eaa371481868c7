"""The page: everything inside, nothing from outside, every name escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from keeplora.cli.tables import matrix_table
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.capacity import Capacity, LayerCapacity, capacity_of, forecast
from keeplora.report import charts, html
from keeplora.report.charts import capacity_map, heat_maps
from keeplora.report.html import Answered, page


def results(method="keeplora", rows=3, tasks=("a", "b", "c"), **changes):
    matrix = [[10.0 * (t + i) for i in range(len(tasks))] for t in range(rows)]
    values = {"benchmark": "mini", "model": "mini", "seed": 0, "seconds": {"train": 12.5}, "peak_memory_mb": 3.0}
    return Results(method=method, tasks=list(tasks), zero_shot=[33.0] * len(tasks), accuracy=matrix, **values | changes)


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())


def read(tmp_path, runs):
    (tmp_path / "report.html").write_text(html.page(runs))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    return page, Reader(page)


def picture_of(page):
    (tag,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert tag["alt"]
    kind, data = tag["src"].split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_page_needs_nothing_from_outside(tmp_path):
    page, parsed = read(tmp_path, [results()])
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[^\"]+", "", page))
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert all(value.startswith("data:") for key, value in attributes.items() if key in ("src", "href"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_one_picture_holds_the_matrices_of_all_runs(tmp_path):
    one = picture_of(read(tmp_path, [results()])[1])
    three = picture_of(read(tmp_path, [results("zero_shot"), results("lora_ft"), results()])[1])
    assert three.width > 2 * one.width
    assert np.asarray(three.convert("L")).std() > 10


def test_the_tables_hold_the_metrics_and_the_final_scores(tmp_path):
    _, parsed = read(tmp_path, [results()])
    cells = [text for text in parsed.text if text]
    assert "keeplora (seed 0)" in cells
    for heading in ("Transfer", "Average", "Last", "Forgetting", "Backward transfer"):
        assert heading in cells
    for key, value in results().summary().items():
        assert f"{value:.1f}" in cells, key
    assert {"20.0", "30.0", "40.0", "33.0", "12.5"} <= set(cells)


def test_names_are_escaped(tmp_path):
    name = "<b>bold</b>&\"'"
    page, parsed = read(tmp_path, [results(method=name, tasks=(name, "b", "c"), benchmark=name, model=name)])
    assert "<b>bold" not in page
    assert name in parsed.text
    assert f"{name} (seed 0)" in parsed.text


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.slow
def test_a_partial_run_has_a_page(tmp_path, rows):
    page, parsed = read(tmp_path, [results(rows=rows), results("lora_ft")])
    assert "None" not in page
    assert "nan" not in page.lower().split("base64")[0]
    assert picture_of(parsed).width > 0


def test_what_people_asked_and_a_model_answered_is_no_markup():
    odd = "<script>alert(1)</script>"
    shown = Answered(task=odd, question=odd, expected=odd, image="", given={odd: odd, "keeplora": "two"})
    text = page([results()], answers=[shown])
    assert odd not in text
    assert text.count("&lt;script&gt;") >= 5
    assert text.count('class="text right"') == 1


def test_a_stream_of_one_task_has_a_page(tmp_path):
    _, parsed = read(tmp_path, [results(rows=1, tasks=("only",))])
    assert picture_of(parsed).height > 0


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes():
    assert heat_maps([results()]) == heat_maps([results()])
    assert heat_maps([results()]) != heat_maps([results(rows=2)])


def test_names_that_matplotlib_would_read_as_formulas_are_drawn(tmp_path):
    _, parsed = read(tmp_path, [results(method="cost $5_a$ ^", tasks=("$\\frac$", "b", "c"))])
    assert picture_of(parsed).width > 0


def remaining():
    """Two layers after two tasks, one of them with a name that is no HTML."""
    layers = [
        {name: {"residual_dims": dims, "protected_dims": 20 - dims, "rank": 2} for name, dims in free.items()}
        for free in ({"<b>.q": 12, "k": 18}, {"<b>.q": 9, "k": 17})
    ]
    return capacity_of([{"name": f"task{i}", "certificate": {"layers": named}} for i, named in enumerate(layers)])


def test_the_page_of_a_run_shows_the_remaining_capacity_with_the_forecast():
    text = page([results()], remaining())
    parsed = Reader(text)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(pictures) == 2
    assert "free" in pictures[1]["alt"]
    assert base64.b64decode(pictures[1]["src"].split(",")[1]) == capacity_map(remaining())
    assert forecast(remaining()) in " ".join(parsed.text)
    assert "<b>.q" not in text
    assert "Remaining capacity" in parsed.text


def test_the_page_of_a_method_that_protects_nothing_has_no_capacity_to_show():
    assert "Remaining capacity" not in page([results()])


@pytest.mark.slow
def test_the_picture_of_the_capacity_grows_with_the_layers_and_stays_bounded():
    def height(count):
        layers = {f"layer{i}": {"residual_dims": 5, "protected_dims": 5, "rank": 2} for i in range(count)}
        capacity = capacity_of([{"name": "a", "certificate": {"layers": layers}}])
        return Image.open(io.BytesIO(capacity_map(capacity))).height

    assert height(4) < height(40) < height(400) == height(900)


@pytest.mark.slow
def long_run(num_tasks):
    names = [f"task number {i} with a name of forty letters"[:40] for i in range(num_tasks)]
    row = [50.0 + i % 40 for i in range(num_tasks)]
    return Results(method="keeplora", benchmark="long", model="mini", seed=0, tasks=names, zero_shot=row,
                   accuracy=[row] * num_tasks, seconds={"train": 1.0}, peak_memory_mb=1.0)  # fmt: skip


@pytest.mark.slow
def test_a_long_stream_stays_readable():
    results = long_run(120)
    layers = {f"layer{i}": LayerCapacity(100, tuple(range(100, 40, -1)) * 2, 4) for i in range(48)}
    capacity = Capacity(tuple(results.tasks), layers)
    assert len(html.page([results], capacity).encode()) < 2 * 10**6
    for drawn in (charts.heat_maps([results]), charts.capacity_map(capacity)):
        assert max(Image.open(io.BytesIO(drawn)).size) < 2500
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(matrix_table(results))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for i in range(120):
        (line,) = [line for line in lines if line.strip().startswith(f"task number {i} ")]
        assert line.split()[-3:] == [f"{results.zero_shot[i]:.1f}"] * 3


def test_the_page_has_the_settings_of_every_run_those_that_differ_first(tmp_path):
    one = results(settings={"rank": 4, "epochs": 3, "weight_energy": {"vision": 0.85, "text": 0.2}})
    other = results("lora_ft", settings={"rank": 8, "epochs": 3, "targets": ["q_proj", "<v>"]})
    assert html.compared({"a": one.settings, "b": other.settings}) == [
        ("rank", ["4", "8"]),
        ("weight_energy", ["vision 0.85, text 0.2", ""]),
        ("targets", ["", "q_proj, <v>"]),
        ("epochs", ["3", "3"]),
    ]
    _, parsed = read(tmp_path, [one, other])
    assert {"rank", "vision 0.85, text 0.2", "q_proj, <v>"} <= set(parsed.text)
