"""The metrics of accuracy matrices that were computed by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeplora.evaluation.accuracy_matrix import Results, average, backward_transfer, forgetting, last, transfer
from keeplora.evaluation.metrics import METRICS, accuracy

FULL = [
    [80.0, 40.0, 30.0],
    [70.0, 90.0, 20.0],
    [74.0, 60.0, 50.0],
]


def results(matrix, tasks=("a", "b", "c")):
    return Results(
        method="m", benchmark="b", model="x", seed=0, tasks=list(tasks), zero_shot=[50.0] * len(tasks), accuracy=matrix
    )


def test_a_full_matrix_gives_the_metrics_computed_by_hand():
    assert transfer(FULL) == pytest.approx((40 + (30 + 20) / 2) / 2)
    assert average(FULL) == pytest.approx(514 / 9)
    assert last(FULL) == pytest.approx((74 + 60 + 50) / 3)
    assert forgetting(FULL) == pytest.approx(((80 - 74) + (90 - 60)) / 2)
    assert backward_transfer(FULL) == pytest.approx(((74 - 80) + (60 - 90)) / 2)


def test_the_best_earlier_score_counts_for_forgetting_from_the_tasks_own_learning_on():
    rising = [[50.0, 99.0, 0.0], [60.0, 40.0, 0.0], [55.0, 45.0, 0.0]]
    assert forgetting(rising) == pytest.approx(((60 - 55) + (40 - 45)) / 2)
    assert backward_transfer(rising) == pytest.approx(((55 - 50) + (45 - 40)) / 2)


def test_two_rows_of_three_use_what_there_is():
    partial = FULL[:2]
    assert transfer(partial) == pytest.approx((40 + (30 + 20) / 2) / 2)
    assert average(partial) == pytest.approx(330 / 6)
    assert last(partial) == pytest.approx(180 / 3)
    assert forgetting(partial) == pytest.approx(80 - 70)
    assert backward_transfer(partial) == pytest.approx(70 - 80)


def test_one_row_of_three_has_no_forgetting_yet():
    partial = FULL[:1]
    assert transfer(partial) == pytest.approx((40 + 30) / 2)
    assert average(partial) == last(partial) == pytest.approx(50)
    assert forgetting(partial) is None
    assert backward_transfer(partial) is None


def test_no_row_gives_no_metric():
    assert [metric([]) for metric in (transfer, average, last, forgetting, backward_transfer)] == [None] * 5


def test_a_stream_of_one_task_has_no_transfer_and_no_forgetting():
    assert (average([[70.0]]), last([[70.0]])) == (70.0, 70.0)
    assert [metric([[70.0]]) for metric in (transfer, forgetting, backward_transfer)] == [None] * 3


@settings(deadline=None)
@given(st.data())
def test_metrics_are_the_papers_definitions_on_any_matrix(data):
    """Written out with t and i from 1, as the paper has them; a partial run has the rows there are."""
    num_tasks = data.draw(st.integers(1, 6))
    num_rows = data.draw(st.integers(1, num_tasks))
    score = st.floats(0, 100)
    a = data.draw(
        st.lists(st.lists(score, min_size=num_tasks, max_size=num_tasks), min_size=num_rows, max_size=num_rows)
    )
    total = 0.0
    for i in range(2, num_tasks + 1):
        before = [a[t - 1][i - 1] for t in range(1, i) if t <= num_rows]
        total += sum(before) / len(before)
    if num_tasks > 1:
        assert transfer(a) == pytest.approx(total / (num_tasks - 1))
    entries = [a[t - 1][i - 1] for t in range(1, num_rows + 1) for i in range(1, num_tasks + 1)]
    assert average(a) == pytest.approx(sum(entries) / len(entries))
    assert last(a) == pytest.approx(sum(a[num_rows - 1][i - 1] for i in range(1, num_tasks + 1)) / num_tasks)
    if num_rows > 1:
        drops = [max(a[t - 1][i - 1] for t in range(i, num_rows)) - a[num_rows - 1][i - 1] for i in range(1, num_rows)]
        assert forgetting(a) == pytest.approx(sum(drops) / len(drops))
        gains = [a[num_rows - 1][i - 1] - a[i - 1][i - 1] for i in range(1, num_rows)]
        assert backward_transfer(a) == pytest.approx(sum(gains) / len(gains))


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_metrics_json_has_the_keys_of_the_contract_in_order(rows):
    assert list(results(FULL[:rows]).to_json()) == [
        "method", "benchmark", "model", "seed", "tasks", "zero_shot", "accuracy", "transfer", "average", "last",
        "forgetting", "backward_transfer", "MFT", "MFN", "MAA", "BWT", "seconds", "peak_memory_mb",
    ]  # fmt: skip


def test_metrics_json_is_plain_json_even_without_rows():
    stored = json.loads(json.dumps(results([]).to_json(), allow_nan=False))
    assert stored["transfer"] is None
    assert stored["accuracy"] == []


def test_accuracy_is_the_share_of_right_answers_in_percent():
    assert METRICS["accuracy"] is accuracy
    assert accuracy(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])) == pytest.approx(200 / 3)
    assert accuracy(torch.tensor([1]), torch.tensor([0])) == 0.0


def test_the_accuracy_of_many_examples_is_not_rounded_to_single_precision():
    count = 1_000_003
    found = accuracy([1] + [0] * (count - 1), [0] * count)
    assert math.isclose(found, 100 * (1 - 1 / count), rel_tol=1e-12)


# Properties on any matrix, that of an unfinished run too

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
EVERY = (transfer, average, last, forgetting, backward_transfer)
SCORES = st.floats(0, 100)


def close(value):
    return pytest.approx(value, abs=1e-9)


@st.composite
def matrices(draw):
    num_tasks = draw(st.integers(1, 6))
    row = st.lists(SCORES, min_size=num_tasks, max_size=num_tasks)
    return draw(st.lists(row, min_size=0, max_size=num_tasks))


@PROPERTY
@given(matrices())
def test_a_metric_is_none_just_where_no_entry_defines_it(a):
    num_rows, num_tasks = len(a), len(a[0]) if a else 0
    known = [num_rows > 0 and num_tasks > 1, num_rows > 0, num_rows > 0, num_rows > 1, num_rows > 1]
    assert [metric(a) is not None for metric in EVERY] == known


@PROPERTY
@given(matrices())
def test_means_of_scores_lie_between_them_and_differences_are_no_larger_than_they(a):
    entries = [score for row in a for score in row]
    for metric in EVERY:
        if (value := metric(a)) is not None:
            low, high = (min(entries), max(entries)) if metric in EVERY[:3] else (-100, 100)
            assert low - 1e-9 <= value <= high + 1e-9
    if len(a) > 1:
        assert forgetting(a) >= -backward_transfer(a) - 1e-9
        assert abs(forgetting(a)) <= max(entries) - min(entries) + 1e-9


@PROPERTY
@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_that_are_not_learned_yet_changes_nothing(a, random):
    num_tasks = len(a[0]) if a else 0
    late = list(range(len(a), num_tasks))
    random.shuffle(late)
    places = [*range(len(a)), *late]
    moved = [[row[i] for i in places] for row in a]
    assert [metric(moved) for metric in EVERY] == [metric(a) and close(metric(a)) for metric in EVERY]
    random.shuffle(places)
    moved = [[row[i] for i in places] for row in a]
    assert [metric(moved) for metric in (average, last)] == [
        metric(a) and close(metric(a)) for metric in (average, last)
    ]


@PROPERTY
@given(matrices(), st.data())
def test_tasks_that_come_later_leave_what_is_said_of_the_memory(a, data):
    """A run that is widened has more columns in every row, and the same rows."""
    if not a:
        return
    more = data.draw(st.integers(1, 3))
    columns = data.draw(st.lists(st.lists(SCORES, min_size=more, max_size=more), min_size=len(a), max_size=len(a)))
    wide = [row + column for row, column in zip(a, columns, strict=True)]
    assert forgetting(wide) == forgetting(a)
    assert backward_transfer(wide) == backward_transfer(a)
    entries = len(a) * len(a[0])
    total = average(a) * entries + sum(map(sum, columns))
    assert average(wide) == close(total / (entries + len(a) * more))
    means = [sum(column[i] for column in columns) / len(a) for i in range(more)]  # None of them is learned.
    before = (transfer(a) or 0.0) * (len(a[0]) - 1)
    assert transfer(wide) == close((before + sum(means)) / (len(a[0]) - 1 + more))


@PROPERTY
@given(matrices())
def test_a_prefix_of_the_rows_is_the_run_as_it_was_then(a):
    for num_rows in range(1, len(a) + 1):
        part = a[:num_rows]
        assert last(part) == close(sum(part[-1]) / len(part[-1]))
        if num_rows > 1:
            gains = [part[-1][i] - part[i][i] for i in range(num_rows - 1)]
            assert backward_transfer(part) == close(sum(gains) / len(gains))
        seen = [[a[t][i] for t in range(min(i, num_rows))] for i in range(1, len(a[0]))]
        if seen:
            assert transfer(part) == close(sum(sum(one) / len(one) for one in seen) / len(seen))


@PROPERTY
@given(matrices(), st.floats(0, 0.5), st.floats(0, 50))
def test_scores_on_another_scale_scale_the_metrics(a, factor, offset):
    scaled = [[factor * score + offset for score in row] for row in a]
    for metric in EVERY:
        if (value := metric(a)) is not None:
            assert metric(scaled) == close(factor * value + (offset if metric in EVERY[:3] else 0))


@PROPERTY
@given(matrices(), st.integers(0, 2**31 - 1), st.text(max_size=8))
def test_metrics_json_comes_back_as_it_was(a, seed, name):
    num_tasks = len(a[0]) if a else 2
    whole = Results(
        method="m", benchmark=name, model=name, seed=seed, tasks=[f"{name}{i}" for i in range(num_tasks)],
        zero_shot=[50.0] * num_tasks, accuracy=a, seconds={name: 1.5}, peak_memory_mb=0.1,
    )  # fmt: skip
    stored = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert stored == whole.to_json()
    fields = ("method", "benchmark", "model", "seed", "tasks", "zero_shot", "accuracy", "seconds", "peak_memory_mb")
    assert Results(**{key: stored[key] for key in fields}) == whole
