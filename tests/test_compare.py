import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeplora.cli import main
from keeplora.compare import CompareConfig, compare
from keeplora.ledger import Ledger
from keeplora.manifest import read_manifest
from keeplora.methods import METHODS, known_methods
from keeplora.workers import Workers
from tiny import save_dual_encoder, tree, write_benchmark

BUDGET = """
[compare]
epochs = 1
search_tasks = 1
learning_rate = [1e-3, 1e-1]

[compare.search.keeplora]
feature_energy = [0.8]
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny model and two tasks with a budget."""
    folder = tmp_path_factory.mktemp("compare")
    model = save_dual_encoder(folder / "model")
    benchmark = write_benchmark(folder, per_class=10)
    benchmark.write_text(BUDGET + benchmark.read_text())
    return {"model": str(model), "benchmark": str(benchmark), "jobs": 1}


@pytest.fixture(scope="module")
def compared(given, tmp_path_factory):
    """Three methods with two seeds and two orders."""
    output = tmp_path_factory.mktemp("three") / "out"
    config = CompareConfig(**given, methods="zero_shot,lora_ft,keeplora", seeds=2, orders=2, output=output)
    return config, compare(config)


def test_every_method_runs_with_every_seed_and_order(compared):
    config, comparison = compared
    places = {(row.method, row.seed, row.order) for row in comparison.rows}
    assert places == {(name, seed, order) for name in config.names for seed in (0, 1) for order in (0, 1)}
    assert not comparison.failures
    orders = [read_manifest(config.output / f"runs/keeplora/order{order}-seed0")["tasks"] for order in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])


def test_all_methods_get_the_same_learning_rates_epochs_and_data_and_the_best_of_them(compared):
    config, comparison = compared
    for name in ("lora_ft", "keeplora"):
        trials = [trial for trial in comparison.trials if trial.method == name]
        assert [trial.settings["learning_rate"] for trial in trials[:2]] == [1e-3, 1e-1]
        best = max(trials, key=lambda trial: trial.value)
        assert comparison.chosen[name] == best.settings
        run = read_manifest(config.output / f"runs/{name}/order0-seed1")["config"]
        assert run["train"]["learning_rate"] == best.settings["learning_rate"]
        assert run["train"]["epochs"] == 1
        assert run["evaluation"] == "test"
    assert comparison.chosen["zero_shot"] == {}
    searched = read_manifest(config.output / "search/lora_ft/learning_rate0.1")
    assert searched["config"]["evaluation"] == "validation"
    assert len(searched["tasks"]) == 1


def test_a_methods_own_setting_is_searched_at_its_best_learning_rate(compared):
    _, comparison = compared
    *rates, own = [trial for trial in comparison.trials if trial.method == "keeplora"]
    best = max(rates, key=lambda trial: trial.value).settings["learning_rate"]
    assert own.settings == {"learning_rate": best, "feature_energy": 0.8}


def test_scores_are_those_of_the_run_directories(compared):
    config, comparison = compared
    for row in comparison.rows:
        folder = config.output / f"runs/{row.method}/order{row.order}-seed{row.seed}"
        recorded = json.loads((folder / "metrics.json").read_text())
        assert row.scores == {key: recorded[key] for key in row.scores}
        trained = row.costs["trained_parameters"]
        both_factors = 2 * 4 * 16 * (24 + 24 + 12 + 12)  # 2 blocks, 4 layers, rank 16, in both towers
        assert {"zero_shot": trained == 0, "lora_ft": trained == both_factors}.get(
            row.method, trained <= both_factors / 2
        )
        assert not (folder / "model").exists()


def test_files_hold_the_comparison(compared):
    config, comparison = compared
    found = json.loads((config.output / "compare.json").read_text())
    assert found == json.loads(json.dumps(comparison.to_json()))
    assert set(found["differences"]) == {"zero_shot", "lora_ft"}
    page = (config.output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert str(comparison.score("keeplora", "last")) in page
    assert (config.output / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_learns_nothing_and_a_method_can_be_added(compared, given, monkeypatch):
    config, comparison = compared
    before = tree(config.output / "runs/keeplora")
    monkeypatch.setattr(importlib.import_module("keeplora.run"), "fit", None)
    assert compare(config).rows == comparison.rows
    after = tree(config.output / "runs/keeplora")
    assert {name: after[name] for name in after if not name.endswith(("run.json", "report.html"))} == {
        name: before[name] for name in before if not name.endswith(("run.json", "report.html"))
    }
    monkeypatch.undo()
    more = CompareConfig(**given, methods="zero_shot,keeplora,joint", seeds=2, orders=1, output=config.output)
    added = compare(more)
    assert {row.method for row in added.rows} == {"zero_shot", "keeplora", "joint"}
    kept = [row for row in comparison.rows if row.order == 0 and row.method == "keeplora"]
    assert [row for row in added.rows if row.method == "keeplora"] == kept


def test_several_jobs_give_the_results_of_one(compared, given, tmp_path):
    _, comparison = compared
    given = {**given, "jobs": 2}
    again = compare(CompareConfig(**given, methods="lora_ft,keeplora", seeds=2, orders=1, output=tmp_path / "two"))
    wanted = {(row.method, row.seed): row.scores for row in comparison.rows if row.order == 0}
    for row in again.rows:
        assert row.scores == pytest.approx(wanted[row.method, row.seed])


def test_a_run_that_diverges_is_listed_and_the_others_are_kept(given, tmp_path, monkeypatch):
    outcomes = iter(["the loss is nan"])

    whole = Workers.run_all

    def one_fails(self, configs, *rest):
        found = whole(self, configs, *rest)
        return [next(outcomes, outcome) if c.seed == 1 else outcome for c, outcome in zip(configs, found, strict=True)]

    monkeypatch.setattr(Workers, "run_all", one_fails)
    found = compare(CompareConfig(**given, methods="keeplora,zero_shot", seeds=2, quick=True, output=tmp_path / "f"))
    assert list(found.failures.values()) == ["the loss is nan"]
    assert len(found.rows) == 3


def test_a_method_that_always_diverges_in_the_search_is_an_error_that_says_so(given, tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "run_all", lambda self, configs, *rest: ["the loss is inf"] * len(configs))
    with pytest.raises(ValueError, match=r"'lora_ft' failed with every setting of the search: .*the loss is inf"):
        compare(CompareConfig(**given, methods="lora_ft", seeds=2, output=tmp_path / "x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "lora_ft,best"}, "unknown method 'best'"),
        ({"reference": "best"}, "unknown method 'best'"),
        ({"methods": " , "}, "methods = ' , ' names no method"),
        ({"seeds": 0}, "seeds = 0 must be at least 1"),
        ({"orders": 0}, "orders = 0 must be at least 1"),
        ({"jobs": 0}, "jobs = 0 must be at least 1"),
        ({"epochs": 0}, "epochs = 0 must be at least 1"),
    ],
)
def test_wrong_settings_are_errors(given, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(CompareConfig(**{**given, "output": tmp_path / "never", **options}))
    assert not (tmp_path / "never").exists()


def test_the_quick_comparison_of_all_methods_and_variants_ends(given, tmp_path, capsys):
    output = tmp_path / "quick"
    flags = ["--model", given["model"], "--benchmark", given["benchmark"], "--jobs", "1", "--output", str(output)]
    main(["compare", "--quick", "--methods", ",".join(known_methods()), "--seeds", "2", *flags])
    shown = capsys.readouterr().out
    assert "less keeplora" in shown
    found = json.loads((output / "compare.json").read_text())
    assert set(found["table"]) == set(known_methods())
    assert not found["failures"]
    assert len(found["runs"]) == 2 * len(known_methods())
    for name in METHODS:
        ledger = Ledger(output / f"runs/{name}/order0-seed0", read_manifest(output / f"runs/{name}/order0-seed0"))
        assert ledger.is_complete


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the process table of Linux")
def test_processes_end_when_the_one_that_started_them_is_killed(given, tmp_path):
    flags = [
        "--model",
        given["model"],
        "--benchmark",
        given["benchmark"],
        "--seeds",
        "40",
        "--output",
        str(tmp_path / "k"),
    ]
    command = [sys.executable, "-m", "keeplora", "compare", "--methods", "keeplora,lora_ft", "--jobs", "2", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list((tmp_path / "k").glob("search/*/*/run.json")):
            assert process.poll() is None, "the comparison ended by itself"
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    deadline = time.monotonic() + 60
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


def is_alive(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and ") Z" not in stat.read_text()
