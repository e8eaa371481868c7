"""Every method and variant: a run that was cut off goes on as if it had not been, and opens again from its files."""

import os
import random
import shutil

import pytest

import tiny
from keeplora.cli import runs as cli
from keeplora.cli.main import main as cli_main
from keeplora.data.benchmark import read_benchmark
from keeplora.evaluation.evaluate import evaluate
from keeplora.methods.registry import known_methods
from keeplora.runs.branch import continued, fork, undo
from keeplora.runs.config import RunConfig
from keeplora.runs.export import ExportConfig, export_run
from keeplora.runs.loop import run
from keeplora.runs.open import Places, read_run, reopen
from keeplora.runs.verify import certify


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


# A run and the files around it


@pytest.fixture
def project(tmp_path):
    """A folder with a benchmark, a model and a complete run, as somebody's project."""
    folder = tmp_path / "project"
    tiny.write_benchmark(folder, tasks=2, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    run(config_of(folder, folder / "runs" / "one", first_tasks=2))
    return folder


def half(folder, output):
    """Run until the first task is finished."""

    def cut(results):
        if len(results.accuracy) == 1:
            raise CutOff

    with pytest.raises(CutOff):
        run(config_of(folder, output), watch=cut)


COMMANDS = {
    "evaluate": lambda folder: cli.evaluate(folder / "runs" / "one"),
    "resume": lambda folder: cli.resume(folder / "runs" / "one"),
    "resume half": lambda folder: cli.resume(folder / "runs" / "half"),
    "run half": lambda folder: run(config_of(folder, folder / "runs" / "half")),
    "certify": lambda folder: cli.certify(folder / "runs" / "one"),
    "undo": lambda folder: cli.undo(folder / "runs" / "one", "task0", output=folder / "undone"),
    "fork": lambda folder: fork(folder / "runs" / "half", config_of(folder, folder / "forked", seed=1)),
    "export": lambda folder: export_run(folder / "runs" / "one", ExportConfig(format="merged", output=folder / "out")),
    "continue": lambda folder: cli_main(
        ["run", "--continue", str(folder / "runs" / "one"), "--benchmark", str(folder / "more.toml")]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_after_the_whole_project_was_moved(project, tmp_path, command):
    half(project, project / "runs" / "half")
    tiny.write_images(project / "data9", seed=9)
    (project / "more.toml").write_text('name = "more"\n[[tasks]]\nname = "task9"\npath = "data9"\n')
    moved = project.rename(tmp_path / "elsewhere")
    COMMANDS[command](moved)
    if "half" in command:
        whole = run(config_of(moved, tmp_path / "whole"))
        assert read_run(moved / "runs" / "half").results().accuracy == whole.accuracy


@pytest.mark.slow
def test_a_benchmark_that_lies_elsewhere_now_is_named_or_asked_for(project, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in project.glob("*"):
        if path.name not in ("runs", "model"):
            path.rename(other / path.name)
    with pytest.raises(ValueError, match=r"colors\.toml"):
        reopen(project / "runs" / "one")
    directory, model, tasks = reopen(project / "runs" / "one", places=Places(other / "colors.toml"))
    assert evaluate(model, tasks) == directory.results().accuracy[-1]


def edited(project, old, new):
    path = project / "colors.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swapped(project):
    path = project / "colors.toml"
    tables = path.read_text().split("[[tasks]]")
    path.write_text("[[tasks]]".join([tables[0], tables[2], tables[1]]))


EDITS = {
    "renamed": lambda project: edited(project, 'name = "task1"', 'name = "taskX"'),
    "template": lambda project: edited(project, "a drawing of a {}.", "a sketch of a {}."),
    "class names": lambda project: edited(project, 'name = "task0"', 'name = "task0"\nclass_names = {red = "pink"}'),
    "data": lambda project: edited(project, 'path = "data1"', 'path = "data0"'),
    "order": swapped,
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_benchmark_is_told_by_every_command_that_reads_it(project, edit):
    half(project, project / "runs" / "half")
    EDITS[edit](project)
    for command in (
        lambda: reopen(project / "runs" / "one"),
        lambda: cli.resume(project / "runs" / "half"),
        lambda: fork(project / "runs" / "half", config_of(project, project / "forked", seed=1)),
        lambda: continued(project / "runs" / "one", str(project / "colors.toml")),
    ):
        with pytest.raises(ValueError, match=r"is not what|holds another run|cannot change|are not those|was another"):
            command()
    assert len(tiny.tree(project / "runs" / "one")) > 5


def more_images(project):
    tiny.write_images(project / "data1", seed=3, per_class=6)


def another_class(project):
    for split in ("train", "test"):
        (project / "data0" / split / "pink").mkdir()
        for image in (project / "data0" / split / "red").iterdir():
            shutil.copyfile(image, project / "data0" / split / "pink" / image.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [(more_images, r"images were \[12, 12\], are \[18, 18\]"), (another_class, "new classes: pink")],
)
def test_data_that_changed_are_told(project, change, words):
    half(project, project / "runs" / "half")
    change(project)
    for command in (lambda: reopen(project / "runs" / "one"), lambda: cli.resume(project / "runs" / "half")):
        with pytest.raises(ValueError, match=rf"its data are not those that .* was begun with \({words}"):
            command()


@pytest.mark.slow
def test_no_image_that_a_run_was_trained_on_is_evaluated_on(project):
    with pytest.raises(ValueError, match="'task0' has no validation split: a fifth of its training images would take"):
        reopen(project / "runs" / "one", split="validation")
    run(config_of(project, project / "runs" / "held", evaluation="validation"))
    reopen(project / "runs" / "held", split="validation")
    reopen(project / "runs" / "held", split="test")
    for index in (0, 1):
        shutil.copytree(project / f"data{index}" / "test", project / f"data{index}" / "validation")
    _, model, tasks = reopen(project / "runs" / "one", split="validation")
    assert len(evaluate(model, tasks)) == 2


def strange(kind, folder):
    place = folder / ("model" if "model" in kind else "tasks/01-task0")
    if "fifo" in kind:
        os.mkfifo(place / "z")
    elif "folder" in kind:
        (place / "more").mkdir()
    elif "link" in kind:
        (place / "z").symlink_to(folder / "run.json")
    else:
        name = "preprocessor_config2.json" if "model" in kind else "adapter_config.json"
        (place / name).write_text("{}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model file", "model fifo", "model folder", "model link", "task file", "task folder"])
def test_what_nobody_listed_is_refused_by_every_command(project, kind):
    folder = project / "runs" / "one"
    strange(kind, folder)
    for command in (
        lambda: reopen(folder),
        lambda: cli.resume(folder),
        lambda: export_run(folder, ExportConfig(format="merged", output=project / "out")),
        lambda: undo(folder, "task0", project / "undone"),
    ):
        with pytest.raises(ValueError, match=r"is not of this run|is a symbolic link"):
            command()
    if "link" not in kind:
        assert any("is not of this run" in breach for breach in certify(folder).breaches)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_complete_run_on_a_read_only_medium_is_shown_evaluated_and_certified(project):
    folder = project / "runs" / "one"
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    cli.resume(folder)
    reopen(folder)
    assert certify(folder).breaches == []


@pytest.mark.slow
def test_a_complete_run_is_shown_without_a_single_write(project, monkeypatch):
    folder = project / "runs" / "one"
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    cli.resume(folder)
    reopen(folder)
    assert certify(folder).breaches == []
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


@pytest.mark.slow
def test_all_files_of_a_run_and_an_export_have_the_usual_modes(project):
    export_run(project / "runs" / "one", ExportConfig(format="merged", output=project / "out"))
    mask = os.umask(0)
    os.umask(mask)
    for folder in (project / "runs" / "one", project / "out"):
        for path in [folder, *folder.rglob("*")]:
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
