"""The continual loop: reproducible, resumable, and honest about what went wrong."""

import importlib
import json
from dataclasses import replace

import pytest
from transformers import AutoModel, AutoTokenizer

import tiny
from keeplora.cli import main as cli
from keeplora.data.benchmark import read_benchmark
from keeplora.evaluation.accuracy_matrix import Results
from keeplora.evaluation.evaluate import evaluate
from keeplora.methods.base import MethodConfig
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.registry import family_of
from keeplora.progress import silent
from keeplora.runs.branch import continued, undo
from keeplora.runs.config import RunConfig
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.verify import certify
from keeplora.training.trainer import TrainConfig, fit

run_module = importlib.import_module("keeplora.runs.loop")  # the package's own `run` is the function

TRAIN = TrainConfig(epochs=2, batch_size=5, learning_rate=0.05)

VARIANTS = {
    "keeplora": {"method": "keeplora", "options": KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.8)},
    "keeplora_cosine": {"options": KeepLoRAConfig(rank=2, weight_energy=0.3, classifier="cosine")},
    "lora_ft": {"method": "lora_ft", "options": MethodConfig(rank=2)},
}  # fmt: skip


class CutOff(Exception):
    """Ends a run on purpose."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a stream of two tasks, and one complete run of every variant."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_benchmark(folder, tasks=2, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    for name, values in VARIANTS.items():
        run(config_of(folder, folder / name, **values))
    return folder


def config_of(folder, output, **changes):
    values = {"benchmark": str(folder / "colors.toml"), "model": str(folder / "model"), "train": TRAIN}
    return RunConfig(output=output, **values | changes)


@pytest.mark.slow
def test_two_runs_are_identical_apart_from_times(place, tmp_path):
    run(config_of(place, tmp_path / "again", **VARIANTS["keeplora"]))
    assert tiny.lasting(tmp_path / "again") == tiny.lasting(place / "keeplora")
    first, second = ((folder / "metrics.json").read_bytes() for folder in (place / "keeplora", tmp_path / "again"))
    assert first.split(b'"seconds"')[0] == second.split(b'"seconds"')[0]


@pytest.mark.slow
def test_another_seed_gives_another_model(place, tmp_path):
    run(config_of(place, tmp_path / "other", **VARIANTS["lora_ft"], seed=1))
    assert tiny.lasting(tmp_path / "other")[0] != tiny.lasting(place / "lora_ft")[0]


def cut_in_watch(monkeypatch):
    def watch(results):
        if len(results.accuracy) == 1:
            raise CutOff

    return watch


def cut_in_training(monkeypatch):
    def cut(model, task, *args, **options):
        if task.name == "task1":
            fit(model, task, replace(TRAIN, epochs=1))
            raise CutOff
        return fit(model, task, *args, **options)

    monkeypatch.setattr(run_module, "fit", cut)
    return lambda results: None


@pytest.mark.parametrize("cut", [cut_in_watch, cut_in_training])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(place, tmp_path, monkeypatch, variant, cut):
    config = config_of(place, tmp_path / "cut", **VARIANTS[variant])
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        run(config, watch=cut(patch))
    assert read_manifest(tmp_path / "cut")["phase"] == "running"
    assert len(json.loads((tmp_path / "cut" / "metrics.json").read_text())["accuracy"]) == 1
    run(config)
    assert tiny.lasting(tmp_path / "cut") == tiny.lasting(place / variant)
    assert read_manifest(tmp_path / "cut")["phase"] == "complete"


@pytest.mark.slow
def test_the_two_variants_learn_different_things(place):
    assert tiny.lasting(place / "keeplora")[0] != tiny.lasting(place / "lora_ft")[0]
    names = set(tiny.lasting(place / "keeplora_cosine")[0])
    assert {"tasks/01-task0/head.safetensors", "tasks/02-task1/head.safetensors"} <= names


def test_a_complete_run_returns_its_results_without_training(place, monkeypatch):
    before = tiny.lasting(place / "keeplora")
    monkeypatch.setattr(run_module, "learn", lambda *args: pytest.fail("a complete run must not learn again"))
    results = run(config_of(place, place / "keeplora", **VARIANTS["keeplora"]))
    assert isinstance(results, Results)
    assert json.loads(json.dumps(results.to_json())) == json.loads((place / "keeplora" / "metrics.json").read_text())
    assert tiny.lasting(place / "keeplora") == before


def test_what_is_watched_is_the_start_and_every_task(place, tmp_path):
    seen = []
    run(config_of(place, tmp_path / "run", method="zero_shot", options=MethodConfig()), watch=seen.append)
    assert [len(results.accuracy) for results in seen] == [0, 1, 2]


def test_zero_shot_learns_nothing(place, tmp_path):
    results = run(config_of(place, tmp_path / "run", method="zero_shot", options=MethodConfig()))
    assert results.accuracy == [results.zero_shot] * 2
    assert results.summary()["forgetting"] == 0.0
    assert not list((tmp_path / "run").glob("tasks/*/adapter"))
    stored, given = (AutoModel.from_pretrained(path).state_dict() for path in (tmp_path / "run/model", place / "model"))
    assert all(stored[name].equal(given[name]) for name in given)


@pytest.mark.parametrize("variant", ["keeplora", "lora_ft"])
def test_the_merged_model_loads_alone_and_gives_the_recorded_scores(place, variant):
    folder = place / variant / "model"
    specs = read_benchmark(str(place / "colors.toml")).tasks
    tasks = DualEncoder().tasks(str(folder), specs, batch_size=3, evaluation="test", seed=0, track=silent)
    recorded = json.loads((place / variant / "metrics.json").read_text())["accuracy"][-1]
    assert evaluate(AutoModel.from_pretrained(folder), tasks) == recorded
    assert AutoTokenizer.from_pretrained(folder)("a red thing")["input_ids"] == [1, 4, 9, 15, 3]


def test_training_changes_the_scores_of_this_stream(place):
    """Without this, equal scores would prove nothing."""
    rows = [json.loads((place / name / "metrics.json").read_text())["accuracy"] for name in VARIANTS]
    zero_shot = json.loads((place / "lora_ft" / "metrics.json").read_text())["zero_shot"]
    assert any(row != zero_shot for matrix in rows for row in matrix)


@pytest.mark.slow
def test_a_failure_at_the_second_task_keeps_the_first_on_disk(place, tmp_path, monkeypatch):
    def failing(model, task, *args, **options):
        if task.name == "task1":
            loss = task.loss
            task.loss = lambda model, batch: loss(model, batch) * float("nan")
        return fit(model, task, *args, **options)

    config = config_of(place, tmp_path / "run", **VARIANTS["keeplora"])
    monkeypatch.setattr(run_module, "fit", failing)
    with pytest.raises(ValueError, match="task1: epoch 1/2, batch 1: the loss is nan"):
        run(config)
    kept, whole = tiny.tree(tmp_path / "run/tasks"), tiny.tree(place / "keeplora/tasks")
    assert {name for name in kept if name.startswith("01-")} == {name for name in whole if name.startswith("01-")}
    assert not [name for name in kept if name.startswith("02-")]
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert read_manifest(tmp_path / "run")["tasks_finished"] == 1
    monkeypatch.undo()
    run(config)
    assert tiny.lasting(tmp_path / "run") == tiny.lasting(place / "keeplora")


@pytest.mark.parametrize("variant", ["keeplora", "lora_ft"])
def test_a_diverging_learning_rate_stops_with_a_clear_error(place, tmp_path, variant):
    config = config_of(place, tmp_path / "run", **VARIANTS[variant] | {"train": replace(TRAIN, learning_rate=1e30)})
    with pytest.raises(ValueError, match=r"task0: epoch .*is (nan|inf|not finite).*[Ll]ower learning_rate"):
        run(config)
    assert read_manifest(tmp_path / "run")["tasks_finished"] == 0


@pytest.mark.slow
def test_a_task_may_have_its_own_number_of_epochs(place, tmp_path):
    lines = (place / "colors.toml").read_text().replace('name = "task1"', 'name = "task1"\nepochs = 1')
    path = place / "short.toml"
    path.write_text(lines)
    run(config_of(place, tmp_path / "run", **VARIANTS["lora_ft"] | {"benchmark": str(path)}))
    losses = [json.loads(file.read_text())["losses"] for file in sorted((tmp_path / "run/tasks").glob("*/task.json"))]
    assert [len(values) for values in losses] == [2, 1]


def test_a_missing_image_folder_is_found_before_anything_is_trained(place, tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text(
        (place / "colors.toml").read_text().replace('"data0"', f'"{place}/data0"').replace('"data1"', '"no"')
    )
    with pytest.raises(ValueError, match=r"'task1': .*no is neither a folder nor a zip archive"):
        run(config_of(place, tmp_path / "run", **VARIANTS["keeplora"] | {"benchmark": str(path)}))
    assert "zero_shot" not in read_manifest(tmp_path / "run")


# Probes


@pytest.fixture
def probed(tmp_path):
    """A stream with a probe, and its model."""
    path = tiny.write_benchmark(tmp_path, tasks=2, per_class=4)
    tiny.write_images(tmp_path / "general", seed=9, per_class=4)
    path.write_text(path.read_text() + '\n[[probes]]\nname = "general"\npath = "general"\n')
    tiny.save_dual_encoder(tmp_path / "model")
    return tmp_path


def probed_run(place, name="run", **changes):
    return tiny.run_config(place, place / name, "keeplora", feature_energy=0.6, **changes)


@pytest.mark.slow
def test_probes_are_evaluated_before_and_after_every_task_and_never_learned(probed, capsys):
    results = run(probed_run(probed, train=TrainConfig(epochs=4, batch_size=4, learning_rate=0.2)))
    assert list(results.probes) == ["general"]
    (spec,) = probed_run(probed).probes
    family = family_of(str(probed / "model"))

    def score(model):
        (task,) = family.tasks(str(model), (spec,), batch_size=5, evaluation="test", seed=0, track=silent)
        return evaluate(family.load(str(model)), [task])[0]

    assert results.probes["general"][0] == pytest.approx(score(probed / "model"))
    assert results.probes["general"][-1] == pytest.approx(score(probed / "run" / "model"))
    assert len(results.probes["general"]) == 3
    metrics = json.loads((probed / "run" / "metrics.json").read_text())
    assert metrics["probes"] == results.probes
    assert metrics["tasks"] == ["task0", "task1"]
    assert "General ability" in (probed / "run" / "report.html").read_text()
    cli.main(["resume", str(probed / "run")])
    assert f"Probe general: untouched {results.probes['general'][0]:.1f}" in capsys.readouterr().out
    assert certify(probed / "run").breaches == []


@pytest.mark.slow
def test_probes_follow_a_run_that_is_undone_continued_or_cut_off(probed):
    whole = run(probed_run(probed))
    alone = run(probed_run(probed, "alone", without=("task0",)))
    undone = undo(probed / "run", "task0", probed / "undone")
    assert undone.probes["general"][0] == whole.probes["general"][0]
    assert len(undone.probes["general"]) == len(alone.probes["general"]) == 2
    first = run(probed_run(probed, "more", first_tasks=1))
    assert first.probes["general"] == whole.probes["general"][:2]
    (probed / "second.toml").write_text(
        (probed / "colors.toml").read_text().split("[[probes]]")[0].replace("task1", "new")
    )
    added = run(continued(probed / "more", str(probed / "second.toml")), extend=True)
    assert len(added.probes["general"]) == len(added.tasks) + 1
    (probed / "colors.toml").write_text((probed / "colors.toml").read_text().replace('"general"', '"other"', 1))
    with pytest.raises(ValueError, match="probes"):
        run(probed_run(probed))


@pytest.mark.slow
def test_a_run_without_probes_knows_nothing_of_them(tmp_path):
    tiny.write_benchmark(tmp_path, tasks=1, per_class=3)
    tiny.save_dual_encoder(tmp_path / "model")
    run(probed_run(tmp_path))
    assert all('"probes"' not in file.read_text() for file in (tmp_path / "run").rglob("*.json"))


def test_a_probe_with_the_name_of_a_task_is_an_error(probed):
    path = probed / "colors.toml"
    path.write_text(path.read_text().replace('name = "general"', 'name = "task0"'))
    with pytest.raises(ValueError, match="two tasks are named 'task0'"):
        run(probed_run(probed))
