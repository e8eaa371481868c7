"""Runs made of other runs: one task less, other settings from here on, more tasks."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tiny
from keeplora.cli import main as cli
from keeplora.evaluation.evaluate import evaluate
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import LoRAFT
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.methods.registry import METHODS
from keeplora.runs.branch import continued, fork, undo, with_more
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.open import read_run, reopen
from keeplora.runs.verify import certify
from keeplora.training.trainer import TrainConfig

NUM_TASKS = 4


class CutOff(Exception):
    """Ends a run on purpose."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a stream of four tasks, and a complete run of it."""
    folder = tmp_path_factory.mktemp("branch")
    tiny.write_benchmark(folder, tasks=NUM_TASKS, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    run(config_of(folder, folder / "whole"))
    return folder


def config_of(place, output, name="keeplora", **changes):
    return tiny.run_config(place, output, name, feature_energy=0.6, **changes)


def updates_of(folder, places):
    """Sum, in float64, the updates of some tasks by the name of the weight."""
    directory, sums = read_run(folder), {}
    for index in places:
        for name, (a, b) in directory.record(index)[0].adapter.factors().items():
            sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + b.double() @ a.double()
    return sums


# Undo


@pytest.mark.parametrize("place_of_task", range(NUM_TASKS))
@pytest.mark.slow
def test_undoing_a_task_leaves_the_base_and_the_other_updates(place, tmp_path, place_of_task):
    others = [index for index in range(NUM_TASKS) if index != place_of_task]
    undo(place / "whole", f"task{place_of_task}", tmp_path / "undone")
    base = load_file(place / "model/model.safetensors")
    model = load_file(tmp_path / "undone/model/model.safetensors")
    sums = updates_of(place / "whole", others)
    assert all(value.abs().max() > 1e-3 for value in sums.values())
    for name, value in model.items():
        expected = base[name].double() + sums.get(name, torch.zeros_like(base[name]))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    assert certify(tmp_path / "undone").breaches == []


@pytest.mark.slow
def test_without_the_last_task_all_is_as_if_it_had_never_been_learned(place, tmp_path):
    undone = undo(place / "whole", "task3", tmp_path / "undone")
    never = run(config_of(place, tmp_path / "never", first_tasks=3))
    assert tiny.lasting(tmp_path / "undone") == tiny.lasting(tmp_path / "never")
    assert (undone.accuracy, undone.zero_shot) == (never.accuracy, never.zero_shot)
    assert tiny.tree(tmp_path / "undone").keys() == tiny.tree(tmp_path / "never").keys()


@pytest.mark.slow
def test_the_directions_of_an_undone_task_are_free_again_and_those_of_the_others_are_not(place, tmp_path):
    undo(place / "whole", "task1", tmp_path / "undone")
    for old, new in (("01-task0", "01-task0"), ("03-task2", "02-task2"), ("04-task3", "03-task3")):
        before = (place / "whole/tasks" / old / "subspace.safetensors").read_bytes()
        assert (tmp_path / "undone/tasks" / new / "subspace.safetensors").read_bytes() == before
    whole, undone = (read_run(folder).tasks[-1]["certificate"] for folder in (place / "whole", tmp_path / "undone"))
    taken = load_file(place / "whole/tasks/02-task1/subspace.safetensors")
    for name, layer in undone["layers"].items():
        assert layer["residual_dims"] == whole["layers"][name]["residual_dims"] + taken[name].shape[1]
    assert any(directions.shape[1] for directions in taken.values())
    assert undone["merge_error"] is None


@pytest.mark.slow
def test_scores_are_evaluated_anew_from_the_undone_task_on_and_kept_before_it(place, tmp_path):
    undone = undo(place / "whole", "task1", tmp_path / "undone")
    whole = read_run(place / "whole").results()
    assert undone.tasks == ["task0", "task2", "task3"]
    assert undone.zero_shot == [whole.zero_shot[i] for i in (0, 2, 3)]
    assert undone.accuracy[0] == [whole.accuracy[0][i] for i in (0, 2, 3)]
    directory, model, tasks = reopen(tmp_path / "undone")
    assert evaluate(model, tasks) == undone.accuracy[-1] == directory.results().accuracy[-1]
    assert json.loads((tmp_path / "undone/metrics.json").read_text())["accuracy"] == undone.accuracy


@pytest.mark.slow
def test_the_directory_says_what_was_undone_and_the_old_one_is_untouched(place, tmp_path):
    before = tiny.tree(place / "whole")
    undo(place / "whole", "task1", tmp_path / "undone")
    manifest = read_manifest(tmp_path / "undone")
    assert manifest["origin"] == {"run": str(place / "whole"), "undone": "task1"}
    assert manifest["config"]["without"] == ["task1"]
    assert tiny.tree(place / "whole") == before
    assert [path.name for path in tmp_path.iterdir()] == ["undone"]


@pytest.mark.slow
def test_several_tasks_are_undone_one_after_another(place, tmp_path):
    undo(place / "whole", "task1", tmp_path / "one")
    undo(tmp_path / "one", "task3", tmp_path / "two")
    undo(place / "whole", "task3", tmp_path / "other")
    undo(tmp_path / "other", "task1", tmp_path / "way")
    for name in ("model/model.safetensors", "tasks/02-task2/subspace.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "way" / name).read_bytes()
    assert read_run(tmp_path / "two").results().accuracy == read_run(tmp_path / "way").results().accuracy


@pytest.mark.slow
def test_the_only_task_cannot_be_undone(place, tmp_path):
    run(config_of(place, tmp_path / "one", first_tasks=1, without=()))
    with pytest.raises(ValueError, match=r"is the only task of .*: without it there is only the base model"):
        undo(tmp_path / "one", "task0", tmp_path / "none")


@pytest.mark.slow
def test_a_run_with_an_undone_task_goes_on_learning(place, tmp_path):
    undo(place / "whole", "task3", tmp_path / "undone")
    with pytest.raises(
        ValueError, match=r"learned: task0, task1, task2, left out: task3\); a task of another name is new"
    ):
        continued(tmp_path / "undone", str(place / "colors.toml"))
    tables = (place / "colors.toml").read_text().split("[[tasks]]")
    again = tables[4].replace('"task3"', '"again"').replace('path = "', f'path = "{place}/')
    (tmp_path / "more.toml").write_text(f"[[tasks]]{again}")
    run(continued(tmp_path / "undone", str(tmp_path / "more.toml")), extend=True)
    # The task has the place, and so the draws, that it had; only its name is another.
    weights = "adapter/adapter_model.safetensors"
    learned = (tmp_path / "undone/tasks/04-again" / weights).read_bytes()
    assert learned == (place / "whole/tasks/04-task3" / weights).read_bytes()


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].one_by_one])
@pytest.mark.slow
def test_every_method_undoes_its_last_task_and_any_other_only_if_it_stands_alone(place, tmp_path, name):
    run(config_of(place, tmp_path / "whole", name, first_tasks=3))
    run(config_of(place, tmp_path / "never", name, first_tasks=2))
    undo(tmp_path / "whole", "task2", tmp_path / "undone")
    if name != "inflora":  # Its threshold depends on the number of tasks that were planned.
        assert tiny.lasting(tmp_path / "undone") == tiny.lasting(tmp_path / "never")
    if METHODS[name].stands_alone:
        undo(tmp_path / "whole", "task0", tmp_path / "first")
        assert certify(tmp_path / "first").breaches == []
    else:
        with pytest.raises(ValueError, match=f"{name} can undo only its last task, 'task2'"):
            undo(tmp_path / "whole", "task0", tmp_path / "first")
        assert not (tmp_path / "first").exists()


@pytest.mark.slow
def test_heads_stay_with_their_tasks(place, tmp_path):
    options = KeepLoRAConfig(rank=2, weight_energy=0.3, feature_energy=0.6, classifier="cosine")
    run(config_of(place, tmp_path / "whole", options=options, first_tasks=3))
    undone = undo(tmp_path / "whole", "task1", tmp_path / "undone")
    head = "head.safetensors"
    old, new = tmp_path / "whole/tasks/03-task2" / head, tmp_path / "undone/tasks/02-task2" / head
    assert new.read_bytes() == old.read_bytes()
    _, model, tasks = reopen(tmp_path / "undone")
    assert evaluate(model, tasks) == undone.accuracy[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "message"), [("task9", "has no finished task 'task9'; it has task0, task1"), ("", "no finished task ''")]
)
def test_an_unknown_task_is_named(place, tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        undo(place / "whole", task, tmp_path / "undone")


def test_an_output_that_is_in_use_is_refused(place, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty; give another --output"):
        undo(place / "whole", "task1", tmp_path)
    assert tiny.tree(tmp_path) == {"thesis.tex": b"x"}


# Undo in a loop of one's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_method_takes_an_update_out_of_the_weights_within_one_rounding(dtype):
    targets = ("fc1", "fc2", "out")
    config = KeepLoRAConfig(rank=2, targets=targets, weight_energy=0.4, feature_energy=0.5, updates="merged")
    method, model, records, states = KeepLoRA(config), tiny.MLP().to(dtype), [], []
    states.append({name: value.clone() for name, value in model.state_dict().items()})
    for seed in range(3):
        task = HalfTask(f"task{seed}", seed, dtype)
        adapted = method.before_task(model, task)
        tiny.train(adapted, task, lr=0.5)
        model = method.after_task(adapted, task)
        records.append(method.record)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    bases = {name: basis.shape[1] for name, basis in method.bases.items()}
    model = method.undo(model, records[2])
    for name, value in model.state_dict().items():
        rounding = torch.finfo(dtype).eps * torch.maximum(states[3][name].abs(), states[2][name].abs()).float()
        assert ((value.float() - states[2][name].float()).abs() <= rounding).all()
    assert any(not torch.equal(states[3][name], states[2][name]) for name in states[2])
    model = method.undo(model, records[0])
    assert {name: bases[name] - basis.shape[1] for name, basis in method.bases.items()} == {
        name: records[0].directions[name].shape[1] + records[2].directions[name].shape[1] for name in bases
    }
    for name, basis in method.bases.items():
        kept = records[1].directions[name]
        torch.testing.assert_close(basis[:, basis.shape[1] - kept.shape[1] :], kept)
    with pytest.raises(ValueError, match="is of no task that the method has learned and not undone"):
        method.undo(model, records[2])


class HalfTask(tiny.VectorTask):
    """Vectors in another precision."""

    def __init__(self, name, seed, dtype):
        super().__init__(name, seed)
        self.data = [(rows.to(dtype), labels) for rows, labels in self.data]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].stands_alone and name != "zero_shot"])
def test_a_method_that_undid_a_task_learns_the_next_as_if_it_had_not_learned_it(name):
    kind = METHODS[name]
    options = {"rank": 2, "targets": ("fc1", "fc2", "out")}
    more = {"weight_energy": 0.1, "feature_energy": 0.5} if name == "keeplora" else {}
    both, one = (kind(kind.Config(**options, **more)) for _ in range(2))
    models = [tiny.WideMLP(), tiny.WideMLP()]
    records = []
    for seed in range(2):
        models[0] = learn(both, models[0], seed)
        records.append(both.record)
        if seed == 0:
            models[1] = learn(one, models[1], seed)
    models[0] = both.undo(models[0], records[1])
    for name_, value in models[1].state_dict().items():
        models[0].get_parameter(name_).data.copy_(value)
    for method, model in zip((both, one), models, strict=True):
        learn(method, model, 5)
    assert both.record.adapter.files() == one.record.adapter.files()


def learn(method, model, seed):
    task = tiny.NarrowTask(f"task{seed}", seed)
    torch.manual_seed(seed)
    adapted = method.before_task(model, task)
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    for batch in task.batches():
        penalty = method.penalty(adapted)
        loss = task.loss(adapted, batch)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
    return method.after_task(adapted, task)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].stands_alone])
def test_a_method_whose_tasks_depend_on_each_other_says_so(name):
    kind = METHODS[name]
    method = kind(kind.Config(rank=2, targets=("fc1",)))
    with pytest.raises(ValueError, match="cannot undo a task: what it learned later depends on it"):
        method.undo(tiny.MLP(), method.record)


def test_what_was_never_learned_or_was_undone_cannot_be_undone():
    method, other = (LoRAFT(MethodConfig(rank=2, targets=("fc1",))) for _ in range(2))
    model = learn(method, tiny.WideMLP(), 0)
    learn(other, tiny.WideMLP(), 1)
    before = model.fc1.weight.clone()
    with pytest.raises(ValueError, match="is of no task that the method has learned"):
        method.undo(model, other.record)
    assert torch.equal(model.fc1.weight, before)
    model = method.undo(model, method.record)
    torch.testing.assert_close(model.fc1.weight, tiny.WideMLP().fc1.weight)
    with pytest.raises(ValueError, match="is of no task that the method has learned and not undone"):
        method.undo(model, method.record)


@pytest.mark.slow
def test_joint_training_undoes_no_task(place, tmp_path):
    run(config_of(place, tmp_path / "joint", "joint", first_tasks=2))
    for task in ("task0", "task1"):
        with pytest.raises(ValueError, match="joint can undo no task"):
            undo(tmp_path / "joint", task, tmp_path / "undone")


@pytest.mark.slow
def test_undo_wants_the_tasks_that_were_learned_and_passes_over_new_ones(place, tmp_path):
    benchmark, text = (
        tmp_path / "own.toml",
        (place / "colors.toml").read_text().replace('path = "', f'path = "{place}/'),
    )
    tables = text.split("[[tasks]]")[1:]
    benchmark.write_text("".join(f"[[tasks]]{table}" for table in tables[:3]))
    run(config_of(place, tmp_path / "run", benchmark=str(benchmark)))
    benchmark.write_text("".join(f"[[tasks]]{table}" for table in tables))
    undone = undo(tmp_path / "run", "task2", tmp_path / "undone")
    assert undone.tasks == ["task0", "task1"]
    benchmark.write_text("".join(f"[[tasks]]{tables[i]}" for i in (1, 0, 2)))
    with pytest.raises(ValueError, match=r"are not those that .* learned; bring them back first"):
        undo(tmp_path / "run", "task2", tmp_path / "again")


def test_an_output_inside_the_run_is_refused(place):
    before = tiny.tree(place / "whole")
    with pytest.raises(ValueError, match=r"is inside .*; give another --output"):
        undo(place / "whole", "task1", place / "whole" / "sub")
    assert tiny.tree(place / "whole") == before


# Fork


@pytest.mark.slow
def test_a_fork_goes_on_with_other_settings_from_the_finished_tasks(place, tmp_path):
    cut = config_of(place, tmp_path / "cut")
    run(replace(cut, first_tasks=2))
    slower = replace(cut, output=tmp_path / "fork", train=replace(cut.train, learning_rate=0.01))
    fork(tmp_path / "cut", slower)
    manifest = read_manifest(tmp_path / "fork")
    assert manifest["tasks_finished"] == 2
    assert "train.learning_rate was 0.05, is 0.01" in manifest["origin"]["changes"]
    results = run(slower)
    whole = read_run(place / "whole").results()
    assert results.accuracy[:2] == whole.accuracy[:2]
    assert results.zero_shot == whole.zero_shot
    files, expected = tiny.tree(tmp_path / "fork"), tiny.tree(place / "whole")
    adapters = [f"tasks/0{i + 1}-task{i}/adapter/adapter_model.safetensors" for i in range(4)]
    assert [files[name] == expected[name] for name in adapters] == [True, True, False, False]
    assert certify(tmp_path / "fork").breaches == []


@pytest.mark.slow
def test_a_fork_with_nothing_changed_ends_as_the_run(place, tmp_path):
    run(config_of(place, tmp_path / "cut", first_tasks=2))
    same = config_of(place, tmp_path / "fork")
    fork(tmp_path / "cut", same)
    run(same)
    assert tiny.lasting(tmp_path / "fork") == tiny.lasting(place / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": KeepLoRAConfig(rank=2, weight_energy=0.5)}, r"options\.weight_energy"),
        ({"options": KeepLoRAConfig(rank=2, weight_energy=0.3, targets=("q_proj",))}, r"options\.targets"),
        ({"method": "lora_ft", "options": MethodConfig(rank=2)}, "method"),
        ({"evaluation": "validation"}, "evaluation"),
        ({"order": 1}, "the finished tasks"),
        ({"options": KeepLoRAConfig(rank=2, weight_energy=0.3, a_training="trained")}, r"options\.a_training"),
    ],
)
def test_a_fork_that_does_not_fit_to_the_finished_tasks_is_refused(place, tmp_path, changes, words):
    with pytest.raises(ValueError, match=f"cannot change .*{words}"):
        fork(place / "whole", config_of(place, tmp_path / "fork", **changes))
    assert not (tmp_path / "fork").exists()


def test_a_fork_needs_a_finished_task_and_one_to_learn(place, tmp_path):
    with pytest.raises(ValueError, match="is complete: nothing is left to learn with other settings"):
        fork(place / "whole", config_of(place, tmp_path / "fork", train=TrainConfig(epochs=3)))

    def cut(results):
        raise CutOff

    with pytest.raises(CutOff):
        run(config_of(place, tmp_path / "begun"), watch=cut)
    with pytest.raises(ValueError, match="has no finished task yet: a fork would be a new run"):
        fork(tmp_path / "begun", config_of(place, tmp_path / "fork"))


@pytest.mark.slow
def test_a_fork_does_not_take_other_data_for_the_same(place, tmp_path):
    """The tasks of the two benchmarks have one name and one relative path each."""
    run(config_of(place, tmp_path / "run", first_tasks=2))
    tiny.write_benchmark(tmp_path / "other", tasks=NUM_TASKS, per_class=4)
    other = config_of(place, tmp_path / "fork", benchmark=str(tmp_path / "other/colors.toml"))
    with pytest.raises(ValueError, match="cannot change the finished tasks"):
        fork(tmp_path / "run", other)


# More tasks


@pytest.fixture
def parts(place, tmp_path):
    """The stream's tasks in two files, a few images each."""
    text = (place / "colors.toml").read_text().replace('path = "', f'path = "{place}/')
    tables = text.split("[[tasks]]")[1:]
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("".join(f"[[tasks]]{table}" for table in tables[:2]))
    second.write_text("".join(f"[[tasks]]{table}" for table in tables[2:]))
    return first, second


@pytest.mark.slow
def test_adding_tasks_to_a_finished_run_equals_one_run_with_all(place, tmp_path, parts):
    first, second = parts
    run(config_of(place, tmp_path / "run", benchmark=str(first)))
    added = run(continued(tmp_path / "run", str(second)), extend=True)
    whole = read_run(place / "whole").results()
    assert (added.tasks, added.zero_shot, added.accuracy) == (whole.tasks, whole.zero_shot, whole.accuracy)
    assert added.benchmark == f"{first.stem} + {second.stem}"
    assert tiny.lasting(tmp_path / "run")[0] == tiny.lasting(place / "whole")[0]
    assert certify(tmp_path / "run").breaches == []
    assert "task3" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_tasks_may_be_added_one_run_at_a_time_and_to_the_same_file(place, tmp_path):
    text = (place / "colors.toml").read_text().replace('path = "', f'path = "{place}/')
    tables = text.split("[[tasks]]")[1:]
    benchmark = tmp_path / "growing.toml"
    for n in range(1, NUM_TASKS + 1):
        benchmark.write_text("".join(f"[[tasks]]{table}" for table in tables[:n]))
        if n == 1:
            run(config_of(place, tmp_path / "run", benchmark=str(benchmark)))
        else:
            run(continued(tmp_path / "run", str(benchmark)), extend=True)
    assert tiny.lasting(tmp_path / "run")[0] == tiny.lasting(place / "whole")[0]
    assert read_run(tmp_path / "run").results().accuracy == read_run(place / "whole").results().accuracy


@pytest.mark.slow
def test_a_continued_run_that_is_cut_off_is_resumed_either_way(place, tmp_path, parts, capsys):
    first, second = parts
    run(config_of(place, tmp_path / "run", benchmark=str(first)))

    def cut(results):
        if len(results.accuracy) == 3:
            raise CutOff

    with pytest.raises(CutOff):
        run(continued(tmp_path / "run", str(second)), extend=True, watch=cut)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    cli.main(["resume", str(tmp_path / "run")])
    run(continued(tmp_path / "other", str(second)), extend=True)
    for folder in ("run", "other"):
        assert tiny.lasting(tmp_path / folder)[0] == tiny.lasting(place / "whole")[0]


@pytest.mark.slow
def test_a_run_that_is_stopped_before_it_has_seen_the_new_tasks_stays_as_it_was(place, tmp_path, parts, monkeypatch):
    first, second = parts
    run(config_of(place, tmp_path / "run", benchmark=str(first)))
    before = tiny.tree(tmp_path / "run")

    def track(items, description, total=None):
        if "task3: evaluating" in description:
            raise CutOff
        return items

    with pytest.raises(CutOff):
        run(continued(tmp_path / "run", str(second)), extend=True, track=track)
    assert tiny.tree(tmp_path / "run") == before


@pytest.mark.slow
def test_the_same_stream_in_one_run_is_more_benchmarks(place, tmp_path, parts):
    first, second = parts
    results = run(config_of(place, tmp_path / "run", benchmark=str(first), more=(str(second),)))
    assert results.accuracy == read_run(place / "whole").results().accuracy


def test_what_cannot_be_continued_says_why(place, tmp_path, parts):
    first, second = parts
    with pytest.raises(ValueError, match="has no task that is new to"):
        continued(place / "whole", str(place / "colors.toml"))
    second.write_text(second.read_text().replace("a drawing of", "a picture of"))
    with pytest.raises(ValueError, match=r"has another task 'task2' than the stream before it; rename one"):
        continued(place / "whole", str(second))
    run(config_of(place, tmp_path / "joint", "joint", benchmark=str(first)))
    with pytest.raises(ValueError, match="joint does not learn task by task"):
        continued(tmp_path / "joint", str(second))


@pytest.mark.slow
def test_more_tasks_come_with_the_settings_of_the_run_or_not_at_all(place, tmp_path, parts):
    first, second = parts
    config = config_of(place, tmp_path / "run", benchmark=str(first))
    run(config)
    same = replace(config, benchmark=str(second))
    assert with_more(tmp_path / "run", same).more == (str(second),)
    for changes, words in (
        ({"seed": 3}, "seed was 0, is 3"),
        ({"first_tasks": 1}, "first_tasks was 2, is 1"),
        ({"more": (str(second),)}, "more was"),
        ({"output": tmp_path / "other"}, "output was"),
    ):
        with pytest.raises(ValueError, match=rf"takes the settings of .*{words}.*or give others to --fork"):
            with_more(tmp_path / "run", replace(same, **changes))
    assert read_run(tmp_path / "run").is_complete


# The command line


@pytest.mark.slow
def test_the_commands_do_what_the_functions_do(place, tmp_path, parts, capsys, monkeypatch):
    first, second = parts
    monkeypatch.chdir(tmp_path)
    run(config_of(place, tmp_path / "run", benchmark=str(first)))
    cli.main(["run", "--continue", "run", "--benchmark", str(second), "--checkpoint-steps", "1"])
    assert tiny.lasting(tmp_path / "run")[0] == tiny.lasting(place / "whole")[0]
    cli.main(["undo", "run", "task3", "--output", "undone"])
    assert "Undone: task3" in capsys.readouterr().out
    assert read_run(tmp_path / "undone").manifest["tasks"] == ["task0", "task1", "task2"]
    run(config_of(place, tmp_path / "half", first_tasks=2))
    cli.main(["run", "--fork", "half", "--first-tasks", "3", "--learning-rate", "0.01", "--output", "forked"])
    directory = read_run(tmp_path / "forked")
    assert (directory.num_finished, directory.manifest["config"]["train"]["learning_rate"]) == (3, 0.01)
    assert directory.manifest["config"]["options"]["rank"] == 2
    cli.main(["run", "--fork", "half", "--first-tasks", "3", "--learning-rate", "0.01", "--output", "forked"])
    for command, words in {
        "run --continue run": "takes the new tasks from --benchmark",
        "run --continue run --fork half --benchmark mini": "give one of --config, --continue and --fork",
        "run --continue nowhere --benchmark mini": "nowhere holds no run",
        "resume nowhere": "nowhere holds no run",
        "run --fork half --seed 1": "needs a new run directory: give --output",
        "run --fork half --method ewc --output x": "was learned by keeplora, and continues with it",
        "certify half --json half/run.json": "is a folder or inside the run",
        "certify half --json .": "is a folder or inside the run",
        "undo run task7 --output x": "no finished task 'task7'",
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(command.split())
        assert caught.value.code == 1
        assert words in " ".join(capsys.readouterr().err.split())
