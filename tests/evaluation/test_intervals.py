import random
import re
import statistics

import pytest
from rich.console import Console
from rich.text import Text
from scipy import stats

from keeplora.cli.tables import comparison_tables
from keeplora.evaluation.intervals import T_975, Estimate, estimate, estimate_runs
from keeplora.studies.compare.comparison import COSTS, Comparison, RunRow, Trial


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
    config = {"benchmark": "b", "model": "m", "reference": "ours", "seeds": 2, "orders": 2, "jobs": 2, "threads": 1}
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


def test_with_one_order_the_interval_is_over_seeds():
    values = {(0, 0): 3.0, (1, 0): 5.0, (2, 0): 4.5}
    assert estimate_runs(values) == estimate(values.values())


def test_with_several_orders_the_interval_is_the_wider_of_both_sides():
    far_orders = {(seed, order): 10.0 * order + seed for seed in range(3) for order in range(2)}
    found = estimate_runs(far_orders)
    assert (found.mean, found.count) == (pytest.approx(6.0), 6)
    assert found.half_width == pytest.approx(estimate([1.0, 11.0]).half_width)
    far_seeds = {(order, seed): value for (seed, order), value in far_orders.items()}
    assert estimate_runs(far_seeds).half_width == pytest.approx(found.half_width)
    assert estimate_runs({(0, 0): 1.0, (0, 1): 2.0}).half_width == estimate([1.0, 2.0]).half_width


@pytest.mark.slow
@pytest.mark.parametrize(("of_order", "of_seed"), [(2.0, 0.0), (0.0, 2.0), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("seeds", "orders"), [(5, 3), (3, 5), (5, 5)])
def test_intervals_hold_the_true_mean_when_orders_and_seeds_have_effects(of_order, of_seed, seeds, orders):
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        order_effects = [draw.gauss(0, of_order) for _ in range(orders)]
        seed_effects = [draw.gauss(0, of_seed) for _ in range(seeds)]
        found = estimate_runs(
            {(s, o): order_effects[o] + seed_effects[s] + draw.gauss(0, 1) for s in range(seeds) for o in range(orders)}
        )
        held += abs(found.mean) <= found.half_width
    assert held >= 900


def test_differences_of_several_orders_have_the_wider_interval_too():
    ours = [row("ours", seed, order, 50.0) for seed in range(3) for order in range(2)]
    theirs = [row("other", seed, order, 50.0 + 4 * order + seed / 8) for seed in range(3) for order in range(2)]
    difference = comparison([*ours, *theirs]).difference("other", "last")
    assert difference.half_width == pytest.approx(estimate([0.125, 4.125]).half_width)


def test_without_a_finished_run_of_the_reference_there_is_no_difference_and_a_note():
    found = comparison([row("other", 0, 0, 51.0)])
    assert found.to_json()["differences"] == {}
    assert "No differences: ours, the reference" in found.notes[-1]
    assert not [note for note in comparison([row("ours", 0, 0, 51.0)]).notes if "No differences" in note]


def test_a_benchmarks_name_is_no_markup():
    found = comparison([row("ours", 0, 0, 51.0)])
    found.config["benchmark"] = "folder/[red]birds.toml"
    assert "[red]birds" in Text.from_markup(comparison_tables(found)[0].title).plain


def test_a_trial_is_chosen_for_methods_that_take_its_settings():
    trials = [Trial("ours", {"learning_rate": rate}, {}, 1.0) for rate in (0.1, 0.2)]
    found = Comparison(
        config=comparison([]).config, trials=trials, chosen={"part": trials[1].settings},
        rows=[row("part", 0, 0, 51.0)], failures={}, inherits={"part": "ours"},
    )  # fmt: skip
    assert [found.is_chosen(trial) for trial in trials] == [False, True]
    assert found.to_json()["trials"] == {"part": 2}
    assert found.num_runs("part") == "1/4"
    assert any("chosen for ours" in note and "part" in note for note in found.notes)


def test_an_estimate_is_written_with_its_interval_and_its_sign_where_asked():
    assert f"{Estimate(1.23456, 0.98765, 3)}" == str(Estimate(1.23456, 0.98765, 3)) == "1.23 ± 0.99"
    assert f"{Estimate(1.23456, 0.98765, 3):+.1f}" == "+1.2 ± 1.0"
    assert f"{Estimate(-1.23456, None, 1):+.2f}" == "-1.23"


def test_the_tables_of_a_terminal_show_two_decimals_and_signed_differences(capsys):
    rows = [row("ours", seed, 0, 50.0 + seed / 3, 40.0) for seed in range(3)]
    rows += [row("other", seed, 0, 51.0 + seed / 7, 41.0) for seed in range(3)]
    for table in comparison_tables(comparison(rows)):
        Console(width=120).print(table)
    shown = capsys.readouterr().out
    assert "50.33 ± 0.83" in shown
    assert "+0.81 ± 0.47" in shown
    assert "+1.00 ± 0.00" in shown
    assert not re.search(r"\d\.\d{3}", shown)
