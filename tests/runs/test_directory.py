"""The run directory: the promised files, their hashes, and what happens to damaged or foreign ones."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models.dual_encoder import DualEncoder
from keeplora.runs.config import RunConfig
from keeplora.runs.directory import RunDirectory
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.open import open_run
from keeplora.training.trainer import TrainConfig


class CutOff(Exception):
    """Ends a run after its first task."""


def after_first_task(results):
    if len(results.accuracy) == 1:
        raise CutOff


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A complete run and one that was cut off after task 1, of one configuration."""
    folder = tmp_path_factory.mktemp("directory")
    benchmark = tiny.write_benchmark(folder, tasks=2, per_class=4)
    config = RunConfig(
        benchmark=str(benchmark),
        model=str(tiny.save_dual_encoder(folder / "model")),
        output=folder / "full",
        train=TrainConfig(epochs=1, batch_size=6, learning_rate=0.01),
        options=KeepLoRAConfig(rank=2, classifier="cosine"),
    )
    run(config)
    with pytest.raises(CutOff):
        run(replace(config, output=folder / "cut"), watch=after_first_task)
    return folder, config


@pytest.fixture
def cut(place, tmp_path):
    folder, config = place
    shutil.copytree(folder / "cut", tmp_path / "cut")
    return replace(config, output=tmp_path / "cut")


TASK_FILES = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "head.safetensors",
    "subspace.safetensors",
    "task.json",
]


def test_the_files_are_those_of_the_contract(place):
    names = set(tiny.tree(place[0] / "full"))
    tasks = {f"tasks/{task}/{name}" for task in ("01-task0", "02-task1") for name in TASK_FILES}
    assert tasks == {name for name in names if name.startswith("tasks/")}
    assert {"run.json", "metrics.json", "report.html", "model/config.json", "model/model.safetensors"} <= names
    outside = {name for name in names if not name.startswith(("tasks/", "model/"))}
    assert outside == {"run.json", "metrics.json", "report.html"}


def test_there_is_no_pickle_only_json_and_safetensors(place):
    names = {name for name in tiny.tree(place[0] / "full") if name != "report.html"}
    assert {name.rsplit(".", 1)[-1] for name in names} <= {"json", "safetensors", "txt", "jinja"}
    for name, content in tiny.tree(place[0] / "full").items():
        assert not content.startswith((b"\x80", b"PK")), name


def test_the_manifest_lists_the_hash_of_every_file(place):
    full = place[0] / "full"
    listed = read_manifest(full)["files"]
    files = tiny.tree(full)
    assert set(listed) == set(files) - {"run.json"}
    for name, digest in listed.items():
        assert hashlib.sha256(files[name]).hexdigest() == digest, name


def test_the_manifest_says_what_was_run(place):
    folder, config = place
    manifest = read_manifest(folder / "full")
    assert manifest["config"]["model"] == config.model
    assert manifest["config"]["seed"] == 0
    assert manifest["config"]["train"]["epochs"] == 1
    assert manifest["config"]["options"]["classifier"] == "cosine"
    assert manifest["config"]["options"]["feature_energy"] == 0.99
    assert manifest["tasks"] == ["task0", "task1"]
    assert (manifest["phase"], manifest["tasks_finished"]) == ("complete", 2)
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"keeplora", "transformers", "peft", "python"} <= set(manifest["versions"])


def test_a_task_file_holds_scores_times_memory_and_certificate(place):
    task = json.loads((place[0] / "full/tasks/02-task1/task.json").read_text())
    assert task["name"] == "task1"
    assert len(task["scores"]) == 2
    assert list(task["phases"]) == ["initialise", "gradient", "head", "train", "merge", "features", "evaluate"]
    assert all(set(phase) == {"seconds", "peak_memory_mb"} for phase in task["phases"].values())
    assert task["certificate"]["worst"]["leak"] < 1e-5
    assert task["certificate"]["worst"]["orthonormality"] < 1e-5
    assert task["certificate"]["merge_error"] < 1e-3
    assert task["certificate"]["worst"]["residual_dims"] >= 0


def test_the_metrics_file_is_what_the_task_files_say(place):
    full = place[0] / "full"
    metrics = json.loads((full / "metrics.json").read_text())
    rows = [json.loads((full / f"tasks/{name}/task.json").read_text())["scores"] for name in ("01-task0", "02-task1")]
    assert metrics["accuracy"] == rows
    assert metrics == json.loads(json.dumps(RunDirectory(full, read_manifest(full)).results().to_json()))


def test_directions_are_stored_for_every_target_and_orthonormal(place):
    directions = load_file(place[0] / "full/tasks/01-task0/subspace.safetensors")
    assert len(directions) == 16
    assert {value.shape[0] for value in directions.values()} == {12, 24}
    for value in directions.values():
        torch.testing.assert_close(value.T @ value, torch.eye(value.shape[1]), atol=1e-5, rtol=0)


def test_the_adapters_rebuild_the_merged_model_in_plain_peft(place):
    folder, config = place
    model = DualEncoder().load(config.model)
    for name in ("01-task0", "02-task1"):
        model = PeftModel.from_pretrained(model, folder / "full/tasks" / name / "adapter").merge_and_unload()
    stored = load_file(folder / "full/model/model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, stored[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASK_FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_file_of_a_finished_task_is_named_on_resume(cut, name, harm):
    path = cut.output / "tasks/01-task0" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content if harm == "flip" else content[:-1])
    if harm == "remove":
        path.unlink()
    with pytest.raises(
        ValueError, match="missing from the run" if harm == "remove" else "changed or damaged"
    ) as caught:
        run(cut)
    assert str(path) in str(caught.value)
    assert read_manifest(cut.output)["tasks_finished"] == 1


@pytest.mark.parametrize("name", TASK_FILES)
def test_every_single_flipped_byte_is_noticed(place, tmp_path, name):
    shutil.copytree(place[0] / "full", tmp_path / "run")
    directory = RunDirectory(tmp_path / "run", read_manifest(tmp_path / "run"))
    path = tmp_path / "run/tasks/01-task0" / name
    good = path.read_bytes()
    for place_of_flip in {0, 7, len(good) // 3, len(good) - 1}:
        bad = bytearray(good)
        bad[place_of_flip] ^= 0x80
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="changed or damaged"):
            directory.read(f"tasks/01-task0/{name}")
    path.write_bytes(good)
    assert directory.read(f"tasks/01-task0/{name}") == good


def test_an_opened_folder_without_content_starts_a_run(tmp_path):
    (tmp_path / "new").mkdir()
    with open_run(tmp_path / "new", {"seed": 0}, ["a"]) as directory:
        assert directory.num_finished == 0
    assert read_manifest(tmp_path / "new")["phase"] == "running"


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(ValueError, match="is not empty and holds no run; give another --output"),
        open_run(tmp_path, {}, ["a"]),
    ):
        pass
    assert tiny.tree(tmp_path) == {"thesis.tex": b"x"}


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match="file is a file; give another --output"),
        open_run(tmp_path / "file", {}, []),
    ):
        pass


def test_a_newer_format_asks_for_an_update(cut):
    manifest = json.loads((cut.output / "run.json").read_text()) | {"format": 99}
    (cut.output / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"run\.json has format 99, newer than 3; update keeplora"):
        run(cut)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"format": 3}', '{"format": "x"}', "\x00", "null"])
def test_a_damaged_manifest_is_named(cut, content):
    (cut.output / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged or not of keeplora"):
        run(cut)


def test_a_run_of_an_older_format_says_what_to_do(cut):
    (cut.output / "run.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="format 1, older than 3; resume it with the keeplora that wrote it"):
        run(cut)


def test_a_folder_without_a_manifest_holds_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"evaluation": "validation"}, "evaluation was 'test', is 'validation'"),
        ({"train": TrainConfig(epochs=9)}, "epochs.*9"),
        ({"options": KeepLoRAConfig(rank=3)}, "rank.*3"),
    ],
)
def test_another_configuration_is_refused_and_the_difference_named(cut, change, words):
    before = tiny.tree(cut.output)
    with pytest.raises(ValueError, match=f"holds another run .*{words}.*give another --output"):
        run(replace(cut, **change))
    assert tiny.tree(cut.output) == before


def test_other_tasks_are_refused(tmp_path):
    with open_run(tmp_path / "run", {"seed": 0}, ["a", "b"]) as directory:
        directory.write("tasks/01-a/task.json", b"{}")
        directory.manifest["tasks_finished"] = 1
        directory.commit()
    with (
        pytest.raises(ValueError, match=r"tasks were \['a', 'b'\], are \['b', 'a'\]"),
        open_run(tmp_path / "run", {"seed": 0}, ["b", "a"]),
    ):
        pass


def test_a_run_without_a_finished_task_may_start_over_with_what_was_mended(tmp_path):
    with open_run(tmp_path / "run", {"seed": 0}, ["a", "b"]) as directory:
        directory.start("digest", [1.0, 2.0], {})
    with open_run(tmp_path / "run", {"seed": 1}, ["b"]) as directory:
        assert "zero_shot" not in directory.manifest
    assert read_manifest(tmp_path / "run")["config"] == {"seed": 1}


def test_a_second_writer_is_refused_while_the_first_is_alive_and_let_in_after(tmp_path):
    again = open_run(tmp_path / "run", {}, ["a"])
    with (
        open_run(tmp_path / "run", {}, ["a"]),
        pytest.raises(ValueError, match=rf"another process \(process {os.getpid()} on .*\) is writing"),
    ):
        again.__enter__()
    with open_run(tmp_path / "run", {}, ["a"]) as directory:
        assert directory.num_finished == 0


def test_the_lock_is_given_back_when_the_run_fails(tmp_path):
    with pytest.raises(CutOff), open_run(tmp_path / "run", {}, ["a"]):
        raise CutOff
    with open_run(tmp_path / "run", {}, ["a"]) as directory:
        assert directory.num_finished == 0


def test_files_that_are_handed_in_take_effect_together(tmp_path):
    with open_run(tmp_path / "run", {}, ["a"]) as directory:
        directory.write("one", b"the old one")
        directory.write("two", b"the old two")
        directory.commit()
        directory.write("one", b"the new one")
        directory.remove("two")
        assert directory.read("one") == b"the old one"
        assert directory.read("two") == b"the old two"
        directory.commit()
        assert directory.read("one") == b"the new one"
    assert set(tiny.tree(tmp_path / "run")) == {"run.json", "one"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    def save(*names):
        def write(place):
            place.mkdir(parents=True)
            for name in names:
                (place / name).write_text(name)

        return write

    with open_run(tmp_path / "run", {}, ["a"]) as directory:
        directory.write_folder("model", save("config", "part1", "part2"))
        directory.commit()
        directory.write_folder("model", save("config", "whole"))
        directory.commit()
        assert directory.damaged() == []
    assert set(tiny.tree(tmp_path / "run")) == {"run.json", "model/config", "model/whole"}
