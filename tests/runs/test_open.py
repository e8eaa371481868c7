"""Every method and variant: a run that was cut off goes on as if it had not been, and opens again from its files."""

import random

import pytest

import tiny
from keeplora.data.benchmark import read_benchmark
from keeplora.evaluation.evaluate import evaluate
from keeplora.methods.registry import known_methods
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.open import reopen


class CutOff(Exception):
    """Ends a run on purpose."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reopen")
    tiny.write_benchmark(folder, tasks=3, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    return folder


def config_of(place, output, name="keeplora", **changes):
    return tiny.run_config(place, output, name, feature_energy=0.8, **changes)


@pytest.mark.parametrize("name", known_methods())
@pytest.mark.slow
def test_every_method_goes_on_after_a_cut_and_opens_again_with_the_recorded_scores(place, tmp_path, name):
    run(config_of(place, tmp_path / "whole", name))

    def cut(results):
        if len(results.accuracy) == 2:
            raise CutOff

    with pytest.raises(CutOff):
        run(config_of(place, tmp_path / "cut", name), watch=cut)
    run(config_of(place, tmp_path / "cut", name))
    assert tiny.lasting(tmp_path / "cut") == tiny.lasting(tmp_path / "whole")
    directory, model, tasks = reopen(tmp_path / "cut")
    assert evaluate(model, tasks) == directory.results().accuracy[-1]


@pytest.mark.slow
def test_a_run_of_some_tasks_in_another_order_opens_with_its_own_stream(place, tmp_path):
    results = run(config_of(place, tmp_path / "run", order=2, first_tasks=2))
    assert len(results.tasks) == 2
    directory, model, tasks = reopen(tmp_path / "run")
    assert [task.name for task in tasks] == results.tasks
    assert evaluate(model, tasks) == results.accuracy[-1]
    assert directory.manifest["config"]["order"] == 2


@pytest.mark.slow
def test_orders_follow_from_their_number_and_hold_every_task(place, tmp_path):
    names = [
        tuple(run(config_of(place, tmp_path / f"{order}", "zero_shot", order=order)).tasks) for order in (0, 1, 2, 3, 4)
    ]
    assert names[0] == ("task0", "task1", "task2")
    assert all(sorted(order) == sorted(names[0]) for order in names)
    assert len(set(names)) == 5
    again = run(config_of(place, tmp_path / "again", "zero_shot", order=3)).tasks
    assert tuple(again) == names[3]


def test_every_order_of_the_tasks_comes_once_and_then_is_an_error(place):
    def stream(order):
        config = RunConfig(benchmark=str(place / "colors.toml"), order=order)
        return tuple(spec.name for spec in config.stream)

    assert len({stream(order) for order in range(6)}) == 6
    with pytest.raises(ValueError, match="order = 6: 3 tasks have only the orders 0 to 5"):
        stream(6)


def test_a_long_streams_order_is_the_shuffle_of_its_number():
    places = list(range(11))
    random.Random(2).shuffle(places)
    names = [spec.name for spec in read_benchmark("mini").tasks]
    assert [spec.name for spec in RunConfig(order=2).stream] == [names[place] for place in places]


@pytest.mark.slow
def test_without_save_model_the_scores_are_the_same_and_the_error_says_what_to_do(place, tmp_path):
    with_model = run(config_of(place, tmp_path / "with"))
    without = run(config_of(place, tmp_path / "without", save_model=False))
    assert without.accuracy == with_model.accuracy
    assert not (tmp_path / "without" / "model").exists()
    with pytest.raises(ValueError, match="save_model = False and has no model; run it again with save_model"):
        reopen(tmp_path / "without")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": -1}, "order = -1: Input should be greater than or equal to 0"),
        ({"first_tasks": 0}, "first_tasks = 0: Input should be greater than 0"),
    ],
)
def test_wrong_streams_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)
