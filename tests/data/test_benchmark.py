"""Benchmark files: what they hold, and what a wrong one is told."""

from pathlib import Path

import pytest

import tiny
from keeplora.config import read_toml
from keeplora.data import benchmark as benchmark_module
from keeplora.data.benchmark import BENCHMARKS, TaskSpec, read_benchmark, stream_of


def write(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


ONE = '[[tasks]]\nname = "a"\npath = "data/a"\n'


def test_a_benchmark_is_read_by_the_path_of_its_file_and_named_after_it(tmp_path):
    benchmark = read_benchmark(str(tiny.write_benchmark(tmp_path, tasks=2, per_class=1)))
    assert benchmark.name == "colors"
    assert [spec.name for spec in benchmark.tasks] == ["task0", "task1"]
    assert benchmark.tasks[1].template == "a photo of a big dark {} thing."


def test_a_benchmark_of_the_package_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_module, "BENCHMARKS", tmp_path)
    write(tmp_path, ONE)
    assert read_benchmark("mine").tasks[0].name == "a"


def test_an_unknown_benchmark_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_module, "BENCHMARKS", tmp_path)
    write(tmp_path, ONE, "first.toml")
    write(tmp_path, ONE, "second.toml")
    with pytest.raises(ValueError, match="unknown benchmark 'third'; known: first, second"):
        read_benchmark("third")


def test_paths_are_relative_to_the_benchmark_file_not_to_where_one_stands(tmp_path, monkeypatch):
    path = write(tmp_path, ONE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    spec = read_benchmark(path).tasks[0]
    assert spec.path == tmp_path / "data" / "a"
    assert spec.hub == "data/a"


def test_an_absolute_path_stays(tmp_path):
    path = write(tmp_path, f'[[tasks]]\nname = "a"\npath = "{tmp_path}/x"\n')
    assert read_benchmark(path).tasks[0].path == tmp_path / "x"


def test_further_orders_come_first_and_random_ones_behind_them(tmp_path):
    tasks = "".join(ONE.replace('"a"', f'"{name}"') for name in "abc")
    path = write(tmp_path, f'orders = [["c", "b", "a"]]\n{tasks}')
    streams = ["".join(spec.name for spec in stream_of(path, order=order)) for order in range(7)]
    assert streams[:2] == ["abc", "cba"]
    assert sorted(streams[2:]) == sorted(["acb", "bac", "bca", "cab", "cba"])
    with pytest.raises(ValueError, match="order = 7: 3 tasks have only the orders 0 to 6"):
        stream_of(path, order=7)


@pytest.mark.parametrize("orders", ['[["a"]]', '[["a", "a"]]', '[["a", "b"], ["b", "c"]]', '[["a", "b", "b"]]'])
def test_an_order_that_is_none_of_the_tasks_is_refused(tmp_path, orders):
    tasks = "".join(ONE.replace('"a"', f'"{name}"') for name in "ab")
    number = 2 if "c" in orders else 1
    with pytest.raises(ValueError, match=f"order {number} of orders does not name each of the tasks once: a, b"):
        read_benchmark(write(tmp_path, f"orders = {orders}\n{tasks}"))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two tasks are named 'a'"):
        read_benchmark(write(tmp_path, ONE + ONE))


def test_a_benchmark_without_tasks_is_refused_with_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.toml: .*at least one"):
        read_benchmark(write(tmp_path, "tasks = []\n"))
    with pytest.raises(ValueError, match=r"mine\.toml: the key 'tasks' is missing"):
        read_benchmark(write(tmp_path, 'description = "x"\n'))


def test_a_template_without_a_place_for_the_class_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.toml: .*'a': template 'a photo.' has no \{\}"):
        read_benchmark(write(tmp_path, ONE + 'template = "a photo."\n'))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\nb", "a\0b"])
def test_a_task_name_that_cannot_name_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        TaskSpec(name=name, path="x")


def test_a_task_name_that_is_too_long_for_a_folder_is_refused():
    with pytest.raises(ValueError, match="is too long for a folder; give a shorter one"):
        TaskSpec(name="x" * 260, path=Path("data"))


def test_zero_epochs_of_a_task_are_refused():
    with pytest.raises(ValueError, match="epochs = 0"):
        TaskSpec(name="a", path="x", epochs=0)


def test_defaults_of_a_benchmark_are_kept_by_table(tmp_path):
    text = ONE + "[defaults.train]\nepochs = 3\n[defaults.keeplora]\nrank = 8\n"
    assert read_benchmark(write(tmp_path, text)).defaults == {"train": {"epochs": 3}, "keeplora": {"rank": 8}}


def test_the_benchmarks_of_the_package_are_all_readable():
    paths = list(benchmark_module.BENCHMARKS.glob("*.toml"))
    if not paths:
        pytest.skip("the package has no benchmark yet")
    for path in paths:
        benchmark = read_benchmark(path.stem)
        assert benchmark.name == path.stem
        assert benchmark.tasks


def test_the_mini_benchmark_lists_the_embedded_tasks():
    embedded = read_toml(BENCHMARKS.parent / "mini" / "tasks.toml")["task"]
    benchmark = read_benchmark("mini")
    assert {task.name: task.template for task in benchmark.tasks} == {t["name"]: t["template"] for t in embedded}
    assert all(task.path.is_file() for task in benchmark.tasks)


@pytest.mark.parametrize(
    ("reader", "key", "value"),
    [("folder", "suffix", "x"), ("dataset", "max_length", 9), ("llava", "template", "a {}"),
     ("messages", "class_names", {"a": "b"}), ("folder", "files", {"train": "x"})],
)  # fmt: skip
def test_keys_that_a_reader_has_no_use_for_are_errors(reader, key, value):
    with pytest.raises(ValueError, match=f"task 't': {key} is for .*, which reader '{reader}' does not give"):
        TaskSpec(name="t", path=Path("x"), reader=reader, **{key: value})
