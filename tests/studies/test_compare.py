import importlib
import json
import multiprocessing
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keeplora.cli.main import main
from keeplora.methods.registry import METHODS, known_methods
from keeplora.runs.config import RunConfig
from keeplora.runs.directory import RunDirectory
from keeplora.runs.manifest import read_manifest
from keeplora.studies.compare.config import CompareConfig, run_config
from keeplora.studies.compare.process_pool import Workers
from keeplora.studies.compare.run import compare
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


@pytest.mark.slow
def test_every_method_runs_with_every_seed_and_order(compared):
    config, comparison = compared
    places = {(row.method, row.seed, row.order) for row in comparison.rows}
    assert places == {(name, seed, order) for name in config.names for seed in (0, 1) for order in (0, 1)}
    assert not comparison.failures
    orders = [read_manifest(config.output / f"runs/keeplora/order{order}-seed0")["tasks"] for order in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_methods_own_setting_is_searched_at_its_best_learning_rates(compared):
    _, comparison = compared
    trials = [trial for trial in comparison.trials if trial.method == "keeplora"]
    rates, own = trials[:2], trials[2:]
    leading = sorted(rates, key=lambda trial: -trial.value)
    assert [trial.settings for trial in own] == [{**trial.settings, "feature_energy": 0.8} for trial in leading]


@pytest.mark.slow
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


@pytest.mark.slow
def test_files_hold_the_comparison(compared):
    config, comparison = compared
    found = json.loads((config.output / "compare.json").read_text())
    assert found == json.loads(json.dumps(comparison.to_json()))
    assert set(found["differences"]) == {"zero_shot", "lora_ft"}
    page = (config.output / "report.html").read_text()
    assert "<td>learning_rate</td>" in page
    assert f"Tasks: {', '.join(comparison.tasks)}." in page
    assert 'class="banner"' not in page
    assert page.count("data:image/png;base64,") == 1
    assert str(comparison.score("keeplora", "last")) in page
    assert "the wider of" in page
    assert "<td>4/4</td>" in page
    assert found["config"]["jobs"] == 1
    assert found["config"]["threads"] == torch.get_num_threads()
    assert found["trials"] == {"zero_shot": 0, "lora_ft": 2, "keeplora": 4}
    assert found["table"]["lora_ft"]["seconds_per_task"]["count"] == 4
    assert (config.output / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_command_again_learns_nothing_and_a_method_can_be_added(compared, given, monkeypatch):
    config, comparison = compared
    before = tree(config.output / "runs/keeplora")
    monkeypatch.setattr(importlib.import_module("keeplora.runs.loop"), "fit", None)
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


@pytest.mark.slow
def test_several_jobs_give_the_results_of_one(compared, given, tmp_path):
    _, comparison = compared
    given = {**given, "jobs": 2}
    again = compare(CompareConfig(**given, methods="lora_ft,keeplora", seeds=2, orders=1, output=tmp_path / "two"))
    wanted = {(row.method, row.seed): row.scores for row in comparison.rows if row.order == 0}
    for row in again.rows:
        assert row.scores == pytest.approx(wanted[row.method, row.seed])


@pytest.mark.slow
def test_a_run_that_diverges_is_listed_and_the_others_are_kept(given, tmp_path, monkeypatch):
    outcomes = iter(["the loss is nan"])

    whole = Workers.run_all

    def one_fails(self, configs, *rest):
        found = whole(self, configs, *rest)
        return [next(outcomes, outcome) if c.seed == 1 else outcome for c, outcome in zip(configs, found, strict=True)]

    monkeypatch.setattr(Workers, "run_all", one_fails)
    found = compare(CompareConfig(**given, methods="keeplora,zero_shot", seeds=2, quick=True, output=tmp_path / "f"))
    assert '<p class="banner">QUICK' in (tmp_path / "f" / "report.html").read_text()
    assert list(found.failures.values()) == ["the loss is nan"]
    assert len(found.rows) == 3


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.slow
def test_a_method_that_diverges_with_every_setting_is_left_out_and_listed(given, tmp_path, jobs):
    benchmark = with_budget(given, "learning_rate = [1e30, 1e31]\n")
    methods = "zero_shot,keeplora,keeplora_trained_a"
    config = CompareConfig(
        **{**given, "benchmark": benchmark, "jobs": jobs}, methods=methods, seeds=1, output=tmp_path / "x"
    )
    found = compare(config)
    assert found.methods == ["zero_shot"]
    (folder, message), *rest = found.failures.items()
    assert not rest
    assert folder == str(tmp_path / "x/search/keeplora")
    assert "so keeplora, keeplora_trained_a is left out" in message
    assert "lower learning_rate" in message.lower()
    assert "keeplora_trained_a is left out" in (tmp_path / "x/report.html").read_text()


def test_runs_that_diverge_are_listed_one_by_one(given, tmp_path):
    benchmark = with_budget(given, "learning_rate = [1e30]\n")
    found = compare(
        CompareConfig(**{**given, "benchmark": benchmark}, methods="lora_ft", seeds=2, output=tmp_path / "x")
    )
    assert not found.rows
    assert list(found.failures) == [str(tmp_path / f"x/runs/lora_ft/order0-seed{seed}") for seed in (0, 1)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.linalg.LinAlgError("no SVD")])
def test_a_run_without_memory_or_without_a_decomposition_is_a_failure(given, tmp_path, monkeypatch, error):
    def fails(config):
        raise error

    monkeypatch.setattr("keeplora.studies.compare.process_pool.run", fails)
    found = compare(CompareConfig(**given, methods="zero_shot", seeds=1, output=tmp_path / "x"))
    assert list(found.failures.values()) == [f"{type(error).__name__}: {error}"]


def with_budget(given, text):
    """Write the benchmark with another [compare] table and return its path."""
    path = Path(given["benchmark"])
    tasks = path.read_text()[path.read_text().index("[[tasks]]") :]
    other = path.with_name(f"other{zlib.crc32(text.encode())}.toml")
    other.write_text(f"[compare]\nepochs = 1\n{text}\n{tasks}")
    return str(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("learning_rate = [1e-3, 1e-3]", "lists a number twice"),
        ("learning_rate = [1e-3, inf]", r"learning_rate = \(0.001, inf\): Input should be a finite number"),
        ("learning_rate = [nan]", r"learning_rate = \(nan,\): Input should be"),
        ("search.best.rank = [1]", r"\[compare.search\]: unknown method 'best'"),
        ("options.best.rank = 1", r"\[compare.options\]: unknown method 'best'"),
        ("search.zero_shot.rank = [1]", r"\[compare.search.zero_shot\]: zero_shot is never searched"),
        ("search.keeplora_random_a.rank = [1]", "is never searched, it takes the settings of keeplora"),
        ("search.keeplora_pp.layer_scale = [0.1]", r"\[compare.search.keeplora_pp\]: layer_scale is what makes"),
        ("search.lora_ft.rank = [4, 4]", "rank = 4 would be tried twice"),
        ("search.lora_ft.learning_rate = [1e-3]", "learning_rate = 0.001 would be tried twice"),
        (
            "search.lora_ft.learning_rate = [-1.0]",
            r"\[compare.search.lora_ft\]: .*learning_rate = -1.0: Input should be greater",
        ),
        ("search.lora_ft.strength = [1]", r"\[compare.search.lora_ft\]: strength is an option of ewc, sefe"),
        ("search.keeplora.feature_energy = [7.0]", r"\[compare.search.keeplora\]: .*feature_energy = 7.0"),
        ("common.learning_rate = 1e-3", r"\[compare.common\]: learning_rate is searched"),
        ("options.lora_ft.learning_rate = 1e-3", r"\[compare.options.lora_ft\]: learning_rate is searched"),
        ("common.rank = 0", r"\[compare.common\]: rank = 0: Input should be greater than 0"),
        ("options.lora_ft.rank = 0", r"\[compare.options.lora_ft\]: rank = 0: Input should be greater than 0"),
    ],
)
def test_a_wrong_budget_is_an_error_that_names_its_table_before_anything_is_trained(given, tmp_path, budget, message):
    rates = "" if budget.startswith("learning_rate") else "learning_rate = [1e-3, 1e-2]\n"
    benchmark = with_budget(given, rates + budget)
    with pytest.raises(ValueError, match=message):
        compare(CompareConfig(**{**given, "benchmark": benchmark}, output=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_a_variants_own_options_go_before_those_of_its_method(given, tmp_path):
    benchmark = with_budget(given, "options.keeplora = { rank = 3, alpha = 2.0 }\noptions.keeplora_pp.rank = 2\n")
    config = CompareConfig(**{**given, "benchmark": benchmark}, output=tmp_path)
    options = run_config(config, "keeplora_pp", {}, seed=0, order=0).options
    assert (options.rank, options.alpha, options.layer_scale) == (2, 2.0, 0.2)


def test_a_launcher_is_an_error_that_says_what_to_use(given, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without a launcher, and use --jobs"):
        compare(CompareConfig(**given, output=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_more_orders_than_the_tasks_have_are_an_error(given, tmp_path):
    with pytest.raises(ValueError, match="2 tasks have only the orders 0 to 1"):
        compare(CompareConfig(**given, orders=3, output=tmp_path / "never"))
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_the_settings_are_written_and_other_ones_are_refused_before_anything_is_trained(given, compared, monkeypatch):
    config, _ = compared
    settings = json.loads((config.output / "settings.json").read_text())
    assert set(settings["versions"]) == {"keeplora", "torch", "transformers", "peft"}
    assert settings["budget"]["learning_rate"] == [1e-3, 1e-1]
    monkeypatch.setattr("keeplora.studies.compare.process_pool.run", None)
    before = tree(config.output)
    for change, message in (
        ({"quick": True}, "budget.learning_rate was .*quick was False, is True"),
        ({"epochs": 9}, r"comparison \(budget.epochs was 1, is 9\)"),
        ({"model": "mini"}, "model was"),
        ({"benchmark": "mini"}, "benchmark was"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*give another --output") as error:
            compare(replace(config, **change))
        assert len(str(error.value)) < 1000
    assert tree(config.output) == before


@pytest.mark.slow
def test_a_folder_of_other_files_is_refused_and_one_of_an_older_comparison_gets_its_settings(given, tmp_path):
    (tmp_path / "thesis.tex").touch()
    config = CompareConfig(**given, methods="zero_shot", seeds=1, output=tmp_path)
    with pytest.raises(ValueError, match="holds other files than those of a comparison; give another --output"):
        compare(config)
    assert sorted(tree(tmp_path)) == ["thesis.tex"]
    (tmp_path / "runs").mkdir()
    compare(config)
    assert (tmp_path / "settings.json").exists()


def test_a_reference_that_was_not_chosen_is_left_out_with_a_note(given, tmp_path):
    found = compare(CompareConfig(**given, methods="zero_shot", seeds=1, output=tmp_path / "x"))
    assert found.to_json()["differences"] == {}
    assert "No differences: keeplora" in (tmp_path / "x/report.html").read_text()
    with pytest.raises(ValueError, match="reference = 'ewc' is not among the methods; add it to --methods, or set"):
        CompareConfig(**given, methods="zero_shot,lora_ft", reference="ewc")


@pytest.mark.parametrize("where", ["in run_all", "in the block"])
def test_an_error_ends_the_processes_at_once(given, where):
    def track(items, *rest):
        if where == "in run_all":
            raise KeyboardInterrupt
        yield from items

    config = RunConfig(benchmark="nowhere.toml", model=given["model"])
    before = multiprocessing.active_children()
    start = time.monotonic()

    def interrupted():
        with Workers(2) as workers:
            workers._pool.submit(time.sleep, 600)
            if where == "in the block":
                raise KeyboardInterrupt
            workers.run_all([config], track, "runs")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 60
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "lora_ft,best"}, "unknown method 'best'"),
        ({"reference": "best"}, "unknown method 'best'"),
        ({"methods": " , "}, "methods = ' , ' names no method"),
        ({"seeds": 0}, "seeds = 0: Input should be greater than 0"),
        ({"orders": 0}, "orders = 0: Input should be greater than 0"),
        ({"jobs": 0}, "jobs = 0: Input should be greater than 0"),
        ({"epochs": 0}, "epochs = 0: Input should be greater than 0"),
        ({"benchmark": "absent"}, "unknown benchmark 'absent'"),
    ],
)
def test_wrong_settings_are_errors(given, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(CompareConfig(**{**given, "output": tmp_path / "never", **options}))
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
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
        directory = RunDirectory(
            output / f"runs/{name}/order0-seed0", read_manifest(output / f"runs/{name}/order0-seed0")
        )
        assert directory.is_complete


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the process table of Linux")
@pytest.mark.slow
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
