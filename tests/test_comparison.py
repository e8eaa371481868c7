import statistics

import pytest
from scipy import stats

from keeplora.comparison import COSTS, T_975, Comparison, Estimate, RunRow, estimate


def test_quantiles_are_students_t():
    for index, quantile in enumerate(T_975):
        assert quantile == pytest.approx(stats.t.ppf(0.975, index + 1), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_interval_is_that_of_students_t(count):
    values = [50.0 + (7 * i % 5) * 1.3 for i in range(count)]
    ours = estimate(values)
    low, high = stats.t.interval(0.95, count - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    assert ours.mean - ours.half_width == pytest.approx(low, rel=1e-4)
    assert ours.mean + ours.half_width == pytest.approx(high, rel=1e-4)
    assert ours.count == count


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate([3.0, None]) == Estimate(3.0, None, 1)
    assert estimate([None]) is None
    assert estimate([]) is None
    assert not Estimate(3.0, None, 1).excludes_zero


def test_an_interval_excludes_zero_on_either_side():
    assert Estimate(1.0, 0.9, 3).excludes_zero
    assert Estimate(-1.0, 0.9, 3).excludes_zero
    assert not Estimate(1.0, 1.1, 3).excludes_zero


def row(method, seed, order, last, transfer=None):
    scores = {"transfer": transfer, "average": last, "last": last, "forgetting": 0.0}
    return RunRow(method, seed, order, scores, dict.fromkeys(COSTS, float(seed)))


def comparison(rows):
    config = {"benchmark": "b", "model": "m", "reference": "ours", "seeds": 2, "orders": 2}
    return Comparison(config=config, trials=[], chosen={}, rows=rows, failures={})


def test_differences_are_paired_by_seed_and_order_not_by_place():
    ours = [row("ours", 0, 0, 50.0), row("ours", 1, 0, 60.0), row("ours", 0, 1, 70.0)]
    theirs = [row("other", 0, 1, 71.0), row("other", 0, 0, 51.0), row("other", 5, 0, 99.0)]
    difference = comparison([*ours, *theirs]).difference("other", "last")
    assert difference.mean == pytest.approx(1.0)
    assert difference.half_width == pytest.approx(0.0)
    assert difference.count == 2


def test_a_metric_that_means_nothing_has_no_estimate_and_no_difference():
    found = comparison([row("ours", 0, 0, 50.0, 40.0), row("other", 0, 0, 51.0)])
    assert found.score("other", "transfer") is None
    assert found.difference("other", "transfer") is None
    plain = found.to_json()
    assert plain["table"]["other"]["transfer"] is None
    assert plain["table"]["ours"]["transfer"]["mean"] == 40.0
    assert "ours" not in plain["differences"]
