"""Each defect that is planted in a small stream is found, named, and decides the exit code; a clean one can start."""

import shutil
import time
from types import SimpleNamespace

import datasets as hf_datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from keeplora.cli import main as cli
from keeplora.errors import listed
from keeplora.methods.registry import METHODS
from keeplora.models.registry import family_of
from keeplora.progress import silent
from keeplora.runs.manifest import manifest_bytes, new_manifest
from keeplora.studies.doctor import diagnose as doctor
from keeplora.studies.doctor import dry_run
from keeplora.studies.doctor.diagnose import diagnose
from keeplora.studies.doctor.findings import Finding, merged

pytestmark = pytest.mark.slow

SETTINGS = {"train": {"batch_size": 6, "epochs": 2}, "options": {"rank": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_dual_encoder(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def stream(tmp_path):
    return tiny.write_benchmark(tmp_path, tasks=2)


def examine(stream, model, method="keeplora", duplicates=True, **values):
    settings = {**SETTINGS, "model": str(model), "output": stream.parent / "run", **values}
    return diagnose(tiny.resolved(str(stream), method, settings), duplicates=duplicates)


def texts(found, level):
    return [f"{one.task}: {one.message}" for one in found.findings if one.level == level]


def only(found, level):
    (text,) = texts(found, level)
    return text


def noise(seed, size=(16, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_a_clean_stream_can_start(stream, model):
    found = examine(stream, model)
    assert texts(found, "problem") == texts(found, "warning") == []
    assert found.exit_code() == found.exit_code(strict=True) == 0
    assert len(found.dry_run.paces) == 2
    assert sum(found.estimate.values()) > 0
    assert set(found.dry_run.peak_memory_mb) == {"gradient", "train", "merge", "evaluate"}
    assert found.disk.total > 2 * found.subject.weight_bytes


def test_nothing_is_written_and_no_weight_changes(stream, model, tmp_path):
    before = tiny.tree(tmp_path)
    found = examine(stream, model)
    assert tiny.tree(tmp_path) == before
    untouched = family_of(str(model)).load(str(model)).state_dict()
    for name, weight in found.subject.model.state_dict().items():
        torch.testing.assert_close(weight, untouched[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_can_make_a_dry_run(stream, model, method):
    found = examine(stream, model, method, options={"rank": 2} if METHODS[method].has_settings else {})
    assert texts(found, "problem") == []
    assert found.estimate["evaluate"] > 0
    assert (found.estimate["train"] > 0.02) == METHODS[method].has_settings


def test_all_defects_are_named_at_once(stream, model):
    data = stream.parent / "data0"
    for i in range(3):
        (data / "train" / "red" / f"{i}.png").write_bytes(b"garbage")
    shutil.rmtree(data / "test" / "blue")
    (stream.parent / "data1" / "train" / "green" / "0.png").write_bytes(b"")
    found = examine(stream, stream.parent / "absent")
    problems = "\n".join(texts(found, "problem"))
    assert "absent' is neither an embedded model" in problems
    assert "task0: 1 class has no image in test: blue" in problems
    assert "task0: 3 images of train cannot be read" in problems
    assert all(f"red/{i}.png" in problems for i in range(3))
    assert "task1: 1 image of train cannot be read" in problems
    assert "green/0.png" in problems
    assert found.exit_code() == 1


def test_many_unreadable_images_are_counted_after_the_first_twenty(tmp_path, model):
    tiny.write_images(tmp_path / "data0", per_class=9)
    stream = tiny.write_benchmark(tmp_path, tasks=1, per_class=9)
    for path in sorted((tmp_path / "data0" / "test").rglob("*.png"))[:23]:
        path.write_bytes(b"garbage")
    text = only(examine(stream, model), "problem")
    assert text.count(".png (") == 20
    assert "and 3 more" in text


def test_a_missing_folder_is_a_problem_and_the_other_task_is_still_examined(stream, model):
    shutil.rmtree(stream.parent / "data0")
    found = examine(stream, model)
    assert "data0 is neither a folder nor a zip archive" in only(found, "problem")
    assert len(found.dry_run.paces) == 1
    assert found.estimate


def test_a_class_that_only_the_held_out_split_has_is_a_problem(stream, model):
    (stream.parent / "data0" / "test" / "pink").mkdir()
    noise(1).save(stream.parent / "data0" / "test" / "pink" / "0.png")
    assert "test has classes that train does not have: pink" in only(examine(stream, model), "problem")


def test_classes_with_one_name_in_the_prompt_are_a_problem(stream, model):
    stream.write_text(stream.read_text() + 'class_names = { red = "green" }\n')
    assert "2 classes are named 'green': green, red" in only(examine(stream, model), "problem")


def test_a_large_imbalance_is_a_warning(stream, model):
    red = stream.parent / "data0" / "train" / "red"
    for i in range(70):
        noise(i).save(red / f"more{i}.png")
    found = examine(stream, model)
    assert "'red' has 76 images, 'green' 6, 13 times fewer" in only(found, "warning")
    assert (found.exit_code(), found.exit_code(strict=True)) == (0, 1)


def test_what_an_image_loses_is_said(stream, model):
    folder = stream.parent / "data0" / "train" / "red"
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    noise(3).convert("RGBA").save(folder / "clear.png")
    noise(4).convert("CMYK").save(folder / "print.jpg")
    noise(5).save(folder / "moving.gif", save_all=True, append_images=[noise(6)])
    found = examine(stream, model)
    warnings, notes = "\n".join(texts(found, "warning")), "\n".join(texts(found, "note"))
    assert "1 image of train with greys of 16 or 32 bits, cut to 8" in warnings
    assert "deep.png" in warnings
    assert "print.jpg" in warnings
    assert "moving.gif" in warnings
    assert "clear.png" in notes


@pytest.mark.parametrize(("side", "level"), [(9, "note"), (3, "warning")])
def test_an_image_below_the_models_input_is_named(stream, model, side, level):
    noise(1, (side, 30)).save(stream.parent / "data0" / "train" / "red" / "small.png")
    text = only(examine(stream, model), level)
    assert "1 of 19 images of train are smaller than the model's 16 x 16 and are enlarged" in text
    assert f"the smallest is 30 x {side}" in text
    assert "small.png" in text


def test_the_same_pixels_in_both_splits_are_a_loud_warning_with_names(stream, model):
    data = stream.parent / "data0"
    Image.open(data / "train" / "red" / "3.png").save(data / "test" / "red" / "copy.bmp")
    found = examine(stream, model)
    text = only(found, "warning")
    assert text.startswith("task0: LEAK: 1 of 19 images of test is in train too, pixel by pixel")
    assert "test/red/copy.bmp = train/red/3.png" in text
    assert found.tasks[0].exact == 1


def test_a_recompressed_copy_is_a_warning_with_names(stream, model):
    data = stream.parent / "data0"
    shapes = Image.new("RGB", (40, 40), "white")
    shapes.paste((200, 30, 30), (5, 8, 25, 30))
    shapes.save(data / "train" / "red" / "shape.png")
    shapes.resize((64, 64)).save(data / "test" / "red" / "shape.jpg", quality=80)
    found = examine(stream, model)
    assert "test/red/shape.jpg = train/red/shape.png" in only(found, "warning")
    assert (found.tasks[0].exact, found.tasks[0].alike) == (0, 1)


def test_an_image_of_another_tasks_training_is_a_note(stream, model):
    Image.open(stream.parent / "data0/train/red/3.png").save(stream.parent / "data1/test/green/copy.png")
    found = examine(stream, model)
    assert "1 of 19 images of test of task1 is in train of task0 too" in only(found, "note")
    assert texts(found, "warning") == []


def test_one_image_under_two_labels_is_a_warning(stream, model):
    train = stream.parent / "data0" / "train"
    shutil.copy(train / "red" / "0.png", train / "green" / "again.png")
    text = only(examine(stream, model), "warning")
    assert "1 image of train with more than one label" in text
    assert "train/green/again.png (green) = train/red/0.png (red)" in text


def test_without_duplicates_only_headers_are_read(stream, model):
    data = stream.parent / "data0"
    shutil.copy(data / "train/red/0.png", data / "test/red/0.png")
    (data / "test/red/1.png").write_bytes(b"garbage")
    found = examine(stream, model, duplicates=False)
    assert "red/1.png" in only(found, "problem")
    assert texts(found, "warning") == []


def test_prompts_beyond_the_context_are_all_named(stream, model):
    text = stream.read_text().replace("a drawing of a {}.", "a drawing of a big big big big {} .", 1)
    stream.write_text(
        text.replace('path = "data0"', 'path = "data0"\nclass_names = { red = "red red", blue = "b b b" }')
    )
    text = only(examine(stream, model), "problem")
    assert "2 prompts longer than the model's context of 12 tokens" in text
    assert "red red .' (13 tokens)" in text
    assert "b b b .' (14 tokens)" in text


def test_class_names_that_the_tokenizer_cannot_tell_apart_are_named(stream, model):
    stream.write_text(stream.read_text() + 'class_names = { red = "zebra", blue = "giraffe" }\n')
    assert "task1: the tokenizer cannot tell class names apart: 'giraffe' = 'zebra'" in only(
        examine(stream, model), "problem"
    )


def test_targets_that_match_no_layer_are_a_problem(stream, model):
    found = examine(stream, model, options={"rank": 2, "targets": ["nothing"]})
    assert "no linear layer is named nothing" in only(found, "problem")


def test_layers_without_capacity_for_the_rank_are_named(stream, model):
    found = examine(stream, model, options={"rank": 8, "weight_energy": 0.97})
    text = "\n".join(texts(found, "warning"))
    assert "layers have fewer free directions than the rank 8" in text
    assert "text_model" in text
    found = examine(stream, model, options={"rank": 2, "weight_energy": 1.0})
    assert "have no free direction at the start" in "\n".join(texts(found, "problem"))


def test_layers_that_no_gradient_reaches_are_named():
    network, task = tiny.MLP(), tiny.VectorTask()
    torch.nn.init.zeros_(network.out.weight)
    assert dry_run.unreached_layers(network, task, ["fc1", "fc2", "out"]) == ["fc1", "fc2"]


def test_weights_that_are_not_finite_are_named(stream, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    found = examine(stream, broken)
    assert name in "\n".join(texts(found, "problem"))


def test_a_failing_step_is_a_problem(stream, model, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(dry_run, "fit", fail)
    found = examine(stream, model)
    assert "a run would fail: no room" in only(found, "problem")
    assert "lower batch_size" in [one.cure for one in found.findings]


@pytest.mark.slow
def test_only_some_tasks_are_read_where_time_is_short_and_all_are_estimated(stream, model, monkeypatch):
    whole = examine(stream, model).pixels_mb
    monkeypatch.setattr(doctor, "READING_SECONDS", 0.0)
    found = examine(stream, model)
    assert len(found.dry_run.paces) == 1
    assert found.pixels_mb == pytest.approx(whole)
    assert found.pixels_mb == pytest.approx(2 * 36 * 3 * 16 * 16 / 2**20)


def test_a_machine_with_too_little_memory_is_a_warning(stream, model, monkeypatch):
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: 1024)
    assert "MiB of memory, and this machine has 1" in only(examine(stream, model), "warning")


@pytest.mark.slow
def test_a_run_that_is_there_already_is_a_note(stream, model):
    (stream.parent / "run").mkdir()
    manifest = new_manifest({}, ["a", "b"]) | {"tasks_finished": 1}
    (stream.parent / "run" / "run.json").write_bytes(manifest_bytes(manifest))
    assert "holds a run already, with 1 of 2 tasks finished" in only(examine(stream, model), "note")
    (stream.parent / "run" / "run.json").write_text("{")
    assert "run.json is damaged" in only(examine(stream, model), "problem")


def test_a_clock_gives_the_first_batches_and_hands_the_source_back():
    task = tiny.VectorTask(sizes=(3, 3, 3, 3, 2))
    with dry_run.clocked(task, "batches", 2) as clock:
        assert len(task.batches()) == 2
        assert len(list(task.batches())) == 2
    assert len(task.batches()) == 5
    assert [len(one) for one in clock.passes] == [2]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_spread_takes_the_ends_first_and_everything_once(count):
    order = dry_run.spread(range(count))
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][:count]


def test_a_disk_without_space_is_a_problem(stream, model, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    assert "MB free" in only(examine(stream, model), "problem")


@pytest.mark.slow
def test_an_output_that_cannot_be_used_is_a_problem(stream, model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    assert "is a file" in only(examine(stream, model, output=tmp_path / "file"), "problem")
    found = examine(stream, model, output=tmp_path / "full")
    assert "is not empty and holds no run" in only(found, "problem")
    assert found.estimate, "the rest is examined all the same"
    assert examine(stream, model, output=tmp_path / "deep" / "er" / "run").exit_code() == 0


def test_an_output_directory_that_cannot_be_written_is_a_problem(stream, model, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "cannot be written: Read-only file system" in only(examine(stream, model), "problem")


@pytest.mark.parametrize("reader", ["zip", "dataset"])
def test_archives_and_datasets_are_examined_too(tmp_path, model, reader):
    stream = tiny.write_benchmark(tmp_path, tasks=1)
    data = tmp_path / "data0"
    shutil.copy(data / "train/red/0.png", data / "test/red/0.png")
    if reader == "zip":
        (data / "train/blue/0.png").write_bytes(b"garbage")
        shutil.make_archive(str(data), "zip", data)
        stream.write_text(stream.read_text().replace('"data0"', '"data0.zip"'))
    else:
        (tmp_path / "stored").mkdir()
        hf_datasets.DatasetDict({split: rows_of(data / split) for split in ("train", "test")}).save_to_disk(
            str(tmp_path / "stored")
        )
        stream.write_text(stream.read_text().replace('"data0"', '"stored"\nreader = "dataset"'))
    found = examine(stream, model)
    assert found.tasks[0].exact == 1
    assert "cannot be read" in only(found, "problem")


def rows_of(folder):
    """Return a split as a dataset; the training split's first image is damaged."""
    names = sorted(path.name for path in folder.iterdir())
    paths = [(path, names.index(name)) for name in names for path in sorted((folder / name).iterdir())]
    images = [{"bytes": path.read_bytes(), "path": None} for path, _ in paths]
    if folder.name == "train":
        images[0]["bytes"] = b"garbage"
    features = hf_datasets.Features({"image": hf_datasets.Image(), "label": hf_datasets.ClassLabel(names=names)})
    return hf_datasets.Dataset.from_dict({"image": images, "label": [label for _, label in paths]}, features=features)


def command(capsys, *arguments):
    """Run `keeplora doctor` and return its exit code and what it shows."""
    code = 0
    try:
        cli.main(["doctor", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return code, " ".join((shown.out + shown.err).split())


@pytest.mark.slow
def test_the_command_shows_a_page_and_ends_with_the_verdict(stream, model, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / "settings.toml"
    settings.write_text(f'benchmark = "{stream}"\nmodel = "{model}"\n[options]\nrank = 2\n')
    code, shown = command(capsys, "--config", settings, "--batch-size", 6)
    assert code == 0
    for part in ("the data", "task0", "What a run would take", "Disk:", "ready: 0 problems, 0 warnings, 0 notes"):
        assert part in shown
    Image.open(stream.parent / "data0/train/red/3.png").save(stream.parent / "data0/test/red/copy.png")
    assert command(capsys, "--config", settings)[0] == 0
    code, shown = command(capsys, "--config", settings, "--strict")
    assert code == 1
    assert "LEAK" in shown
    code, shown = command(capsys, "--config", settings, "--model", "absent")
    assert code == 1
    assert "not ready: 1 problem, 1 warning" in shown


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        ("seed = = 3", [], "is not a TOML file"),
        ("sed = 3", [], "unknown key 'sed'"),
        ("train = 3", ["--batch-size", "4"], "train = 3 must be a table"),
        ("", ["--method", "best"], "unknown method 'best'"),
        ("", ["--benchmark", "none"], "unknown benchmark 'none'"),
        ("", ["--batch-size", "0"], "batch_size = 0"),
    ],
)
def test_a_wrong_setting_ends_with_one_message(capsys, tmp_path, content, flags, expected):
    (tmp_path / "mine.toml").write_text(content)
    code, shown = command(capsys, "--config", tmp_path / "mine.toml", *flags)
    assert code == 1
    assert expected in shown


def test_findings_of_several_tasks_that_say_the_same_become_one():
    found = merged([Finding("note", "a", "x"), Finding("problem", "b", "y"), Finding("note", "c", "x")])
    assert found == [Finding("problem", "b", "y"), Finding("note", "a, c", "x")]
    assert listed(["1", "2", "3"], 2) == "1, 2, and 1 more"


@pytest.mark.parametrize(("names", "is_told"), [(("n01440764", "n01443537", "n1"), True), (("0", "1", "2"), True),
                                                (("a380", "robin", "wren"), False)])  # fmt: skip
def test_class_names_that_are_codes_are_told(stream, model, names, is_told):
    for split in ("train", "test"):
        for old, new in zip(("blue", "green", "red"), names, strict=True):
            (stream.parent / "data0" / split / old).rename(stream.parent / "data0" / split / new)
    warnings = texts(examine(stream, model), "warning")
    assert any("class names look like codes" in text for text in warnings) == is_told


def test_files_that_are_left_out_and_pictures_without_light_are_told(stream, model):
    folder = stream.parent / "data0" / "train" / "red"
    (folder / "notes.txt").write_text("x")
    Image.fromarray(np.random.default_rng(0).integers(0, 15, (20, 16, 3), dtype=np.uint8)).save(folder / "dark.png")
    warnings = " ".join(texts(examine(stream, model), "warning"))
    assert "1 file of train left out: train/red/notes.txt (.txt is no image that Pillow reads)" in warnings
    assert "1 image of train are nearly black" in warnings


def test_a_mistake_of_ours_is_no_finding(stream, model, monkeypatch):
    monkeypatch.setattr("keeplora.studies.doctor.data.examine_splits", lambda *args: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        examine(stream, model)


@pytest.mark.parametrize("kind", ["no class", "no image"])
def test_a_split_without_anything_is_a_problem(tmp_path, model, kind):
    path = tiny.write_benchmark(tmp_path, tasks=1)
    for folder in (tmp_path / "data0" / "train").iterdir():
        shutil.rmtree(folder)
        if kind == "no image":
            folder.mkdir()
    assert texts(examine(path, model), "problem")


def test_prompts_and_the_untouched_model_are_shown_for_every_task(stream, model):
    found = examine(stream, model, train={"batch_size": 4})
    assert found.tasks[0].prompts == [f"a drawing of a {color}." for color in ("blue", "green", "red")]
    family = family_of(str(model))
    tasks = family.tasks(str(model), found.config.stream, batch_size=4, evaluation="test", seed=0, track=silent)
    for task in tasks:
        batches = list(task.test_batches())
        assert len(batches) == 5
        tried = [batches[i] for i in (0, 1, 3, 4)]
        predicted = [task.predict(family.load(str(model)), batch) for batch in tried]
        labels = torch.cat([batch["labels"] for batch in tried])
        expected = 100 * float((torch.cat(predicted) == labels).double().mean())
        assert found.dry_run.untouched[task.name] == (pytest.approx(expected), "4 of 5")


def test_a_spread_clock_takes_batches_from_all_over():
    class Slow(list):
        def __iter__(self):
            for item in super().__iter__():
                time.sleep(0.003)
                yield item

    source = SimpleNamespace(test_batches=lambda: Slow(range(23)))
    with dry_run.clocked(source, "test_batches", 4, spread=True) as clock:
        assert list(source.test_batches()) == [0, 7, 15, 22]
        assert len(clock) == 4
    assert max(clock.passes[0]) < 5 * 0.003, "what lies between is not counted"
