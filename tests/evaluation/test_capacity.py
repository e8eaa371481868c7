"""Remaining capacity: forecasts against ones made by hand."""

import logging
import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeplora.evaluation.capacity import capacity_of, forecast, warn_of_full_layers

WIDTH = 40


def task(number=0, rank=4, d_in=WIDTH, **left):
    """Return what `task.json` holds: the free dimensions of each layer after the task."""
    layers = {
        name: {"leak": 0.0, "orthonormality": 0.0, "residual_dims": dims, "protected_dims": d_in - dims, "rank": rank}
        for name, dims in left.items()
    }
    return {"name": f"t{number}", "certificate": {"layers": layers, "merge_error": 0.0}}


def stream(*left, rank=4):
    return [task(number, rank, layer=dims) for number, dims in enumerate(left)]


def remaining(*left, rank=4):
    return capacity_of(stream(*left, rank=rank)).layers["layer"]


def counted(left, added, dims):
    """Count by hand: take the dimensions away, task by task, as long as there are enough."""
    number = 0
    while left >= dims:
        number, left = number + 1, left - added
    return number


def test_the_forecast_is_the_one_made_by_hand():
    found = remaining(30, 27, 22, 20, 18)  # The last three tasks took 5, 2 and 2: 3 each.
    assert found.added == 3
    assert found.d_in == WIDTH
    assert found.full_rank_tasks == 5  # They find 18, 15, 12, 9 and 6; the next would find 3.
    assert found.tasks_that_find(1) == 6  # The last one finds 3; then there is nothing.
    assert found.share == 18 / WIDTH


def test_the_first_task_does_not_count_as_its_part_cannot_be_told_from_the_principal_subspace():
    assert remaining(10, 9).added == 1
    assert remaining(10).added is None
    assert remaining(10).full_rank_tasks is None
    assert "needs two tasks" in forecast(capacity_of(stream(10)))


@pytest.mark.parametrize(
    ("left", "fits", "at_all"),
    [((9, 3), 0, 1), ((9, 4), 1, 1), ((9, 0), 0, 0), ((3,), 0, None), ((0,), 0, 0), ((9, 9), math.inf, math.inf)],
)
def test_a_layer_at_the_end_has_no_task_left(left, fits, at_all):
    assert (remaining(*left).full_rank_tasks, remaining(*left).tasks_that_find(1)) == (fits, at_all)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 6))
def test_the_forecast_is_what_counting_down_gives(taken, rank):
    left = [WIDTH]
    for dims in taken:
        left.append(max(left[-1] - dims, 0))
    found = remaining(*left, rank=rank)
    steps = [before - after for before, after in pairwise(left)][-3:]
    if any(steps):
        added = Fraction(sum(steps), len(steps))
        assert found.full_rank_tasks == counted(left[-1], added, rank)
        assert found.tasks_that_find(1) == counted(left[-1], added, 1)
    assert found.full_rank_tasks <= found.tasks_that_find(1)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
@pytest.mark.slow
def test_more_capacity_or_a_smaller_rank_never_fits_fewer_tasks(left, more, rank):
    def fits(left, rank):
        return remaining(left + 7, left + 4, left, rank=rank).full_rank_tasks

    assert fits(min(left + more, WIDTH - 7), rank) >= fits(left, rank)
    assert fits(left, rank + more) <= fits(left, rank)


def test_a_rank_that_shrank_is_still_asked_for():
    tasks = [task(0, rank=4, layer=20), task(1, rank=4, layer=9), task(2, rank=2, layer=3)]
    assert capacity_of(tasks).rank == 4
    assert capacity_of(tasks).layers["layer"].full_rank_tasks == 0


def test_a_rank_wider_than_a_layer_asks_for_the_whole_layer():
    narrow = capacity_of([task(0, rank=50, layer=WIDTH), task(1, rank=50, layer=WIDTH)]).layers["layer"]
    assert narrow.rank == WIDTH
    assert narrow.full_rank_tasks == math.inf


def test_the_first_layer_to_run_out_is_the_one_with_the_fewest_tasks_not_the_smallest():
    tasks = [task(0, slow=12, quick=30), task(1, slow=11, quick=20)]
    capacity = capacity_of(tasks)
    assert capacity.first_to_fill() == "quick"
    sentence = forecast(capacity)
    assert "about 2 tasks more find capacity for rank 4 in every layer" in sentence
    assert "quick (20 of 40 input dimensions free), full after about 2 tasks" in sentence
    assert "half of the layers last for about 5 tasks" in sentence  # Of 2 and 8, the mean.


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([task(0, a=9, b=5), task(1, a=8, b=0)], "1 of 2 layers are full and learn no more; the first is b (0 of 40"),
        ([task(0, a=9, b=5), task(1, a=8, b=2)], "1 of 2 layers have no capacity left for rank 4; the first is b (2"),
        ([task(0, a=9, b=8), task(1, a=9, b=8)], "took no dimension of any layer; the fullest is b (8 of 40"),
        ([task(0, a=40, b=9), task(1, a=39, b=9)], "about 36 tasks more find capacity"),
        ([task(0, a=9), task(1, a=5), task(2, a=4)], "If tasks continue like the last 2, about 1 task more"),
    ],
)
def test_the_sentence_says_how_things_stand(tasks, expected):
    assert expected in forecast(capacity_of(tasks))


def test_layers_that_nothing_is_taken_from_last_for_ever():
    sentence = forecast(capacity_of([task(0, a=40, b=9, c=9), task(1, a=39, b=9, c=9)]))
    assert "half of the layers last for as long as one can see" in sentence


@pytest.mark.parametrize("certificate", [{}, {"merge_error": 0.1}, {"layers": {}}])
def test_what_protects_nothing_has_no_gauge(certificate):
    tasks = [{"name": "a", "certificate": certificate}]
    assert capacity_of(tasks) is None
    assert capacity_of([]) is None
    warn_of_full_layers(tasks, 3)


def test_layers_that_differ_in_numbers_only_are_of_one_kind():
    names = {"text.layers.0.q_proj": 9, "text.layers.11.q_proj": 8, "text.layers.0.k_proj": 7, "fc1": 5}
    kinds = capacity_of([task(0, **names)]).by_kind()
    assert {kind: [layer.left[-1] for layer in layers] for kind, layers in kinds.items()} == {
        "text.layers.*.q_proj": [9, 8],
        "text.layers.*.k_proj": [7],
        "fc1": [5],
    }


def warned(caplog, tasks, num_to_come):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_full_layers(tasks, num_to_come)
    return caplog.text


def test_a_warning_comes_a_task_before_the_capacity_is_gone_and_only_once(caplog):
    tasks = stream(16, 12, 8, 4, 0)  # With rank 4: 4 tasks fit after the second, then 2, then 1.
    assert not warned(caplog, tasks[:2], 9)
    assert not warned(caplog, tasks[:3], 9)
    message = warned(caplog, tasks[:4], 9)
    assert "after task 't3': 1 of 1 layers have capacity for rank 4 in one more task at most" in message
    assert "layer (4 left)" in message
    assert not warned(caplog, tasks[:5], 9)


def test_no_warning_comes_where_no_task_comes_that_it_concerns(caplog):
    tasks = stream(16, 12, 8, 4)
    assert not warned(caplog, tasks, 0)
    assert not warned(caplog, tasks, 1)  # One more fits.
    assert warned(caplog, stream(16, 12, 3), 1)
    assert warned(caplog, stream(3), 1)
