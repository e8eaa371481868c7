"""Certifying a run: a sound one passes, whatever the method, and what is damaged or forged is found and named."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save

import tiny
from keeplora.cli import main as cli
from keeplora.evaluation.capacity import forecast
from keeplora.methods.registry import known_methods
from keeplora.runs import verify
from keeplora.runs.atomic_store import Store, write_atomically
from keeplora.runs.directory import RunDirectory
from keeplora.runs.loop import run
from keeplora.runs.manifest import manifest_bytes, read_manifest
from keeplora.runs.open import open_run
from keeplora.runs.verify import certify

FIRST, SECOND = "tasks/01-task0", "tasks/02-task1"
pytestmark = pytest.mark.slow

WEIGHTS = "adapter/adapter_model.safetensors"
LAYER = "vision_model.encoder.layers.1.self_attn.v_proj"
A, B = (f"base_model.model.{LAYER}.lora_{factor}.weight" for factor in "AB")
PROTECTING = ("keeplora", "inflora")


class CutOff(Exception):
    """Ends a run on purpose."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certify")
    tiny.write_benchmark(folder, tasks=3, per_class=4)
    tiny.save_dual_encoder(folder / "model")
    return folder


def config_of(place, output, name="keeplora", **changes):
    return tiny.run_config(place, output, name, feature_energy=0.7, **changes)


@pytest.fixture(scope="module")
def original(place):
    """A complete run of KeepLoRA."""
    run(config_of(place, place / "run"))
    return place / "run"


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(original, tmp_path / "run")


def forge(folder, name, content):
    """Replace a file and its hash in `run.json`, as one would who wants it to go unnoticed; None removes it."""
    manifest = read_manifest(folder)
    manifest["files"].pop(name, None)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    write_atomically(folder / "run.json", manifest_bytes(manifest))


def forge_tensors(folder, name, change, *, is_thorough=True):
    """Forge a file of tensors, and, if thorough, what task.json says of its content."""
    tensors = load_file(folder / name)
    change(tensors)
    forge(folder, name, save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"}))
    if is_thorough and name.startswith("tasks/"):
        place = name.split("/")[1]
        digest = RunDirectory(folder, read_manifest(folder)).record(int(place.split("-")[0]) - 1)[0].whole_digest()
        forge_json(folder, f"tasks/{place}/task.json", lambda details: details.update(digest=digest))


def forge_json(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    forge(folder, name, json.dumps(value).encode())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def breaches(folder):
    return " | ".join(certify(folder).breaches)


def test_tensors_that_fit_but_are_not_those_of_the_task_are_found(folder):
    forge_tensors(folder, f"{FIRST}/subspace.safetensors", lambda tensors: tensors[LAYER].neg_(), is_thorough=False)
    assert "its files hold other tensors than those that its task.json was written for" in breaches(folder)


def test_a_tensor_too_many_in_an_adapter_is_found(folder):
    def add(tensors):
        tensors["base_model.model.more"] = torch.zeros(2)

    forge_tensors(folder, f"{FIRST}/{WEIGHTS}", add)
    assert "its adapter holds 'base_model.model.more', which is no factor" in breaches(folder)


@pytest.fixture(scope="module")
def with_heads(place):
    run(config_of(place, place / "heads", "keeplora_plus"))
    return place / "heads"


HEADS = {
    "negated": (lambda tensors: tensors["weight"].neg_(), "other tensors than those", False),
    "not a number": (lambda tensors: tensors["weight"].fill_(float("nan")), "not one finite weight", True),
    "one class less": (lambda tensors: tensors.update(weight=tensors["weight"][:-1]), "for 3 classes", True),
    "another name": (lambda tensors: tensors.update(bias=torch.zeros(3)), "not one finite weight", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_a_forged_classifier_is_found(with_heads, tmp_path, kind):
    change, words, is_thorough = HEADS[kind]
    folder = shutil.copytree(with_heads, tmp_path / "run")
    assert certify(folder).breaches == []
    forge_tensors(folder, f"{FIRST}/head.safetensors", change, is_thorough=is_thorough)
    assert words in breaches(folder)


@pytest.mark.slow
def test_a_classifier_that_was_removed_is_found(with_heads, tmp_path):
    folder = shutil.copytree(with_heads, tmp_path / "run")
    forge(folder, f"{FIRST}/head.safetensors", None)
    assert "it has no classifier, against the run's settings" in breaches(folder)


def unchecked(proof):
    return [task.name for task in proof.tasks if not task.is_checked]


@pytest.mark.parametrize("name", known_methods())
@pytest.mark.slow
def test_a_clean_run_of_every_method_passes(place, tmp_path, name):
    config = config_of(place, tmp_path / "run", name)
    run(config)
    before = tiny.tree(config.output)
    proof = certify(config.output)
    assert proof.breaches == []
    assert proof.merge_error == 0
    assert [task.name for task in proof.tasks] == ["task0", "task1", "task2"]
    assert not unchecked(proof)
    assert proof.num_files == len(before) - 1  # run.json has its hash within it
    assert tiny.tree(config.output) == before
    assert proof.protects == name.startswith(PROTECTING)
    if proof.protects and "trained" not in str(config.options):
        assert max(layer.leak for task in proof.tasks for layer in task.layers.values()) < 1e-5
        assert {layer.rank for layer in proof.tasks[0].layers.values()} == {2}
        assert proof.capacity is not None


def test_what_is_measured_is_what_the_run_recorded(original):
    for task, folder in zip(certify(original).tasks, sorted((original / "tasks").iterdir()), strict=True):
        recorded = json.loads((folder / "task.json").read_text())["certificate"]["layers"]
        assert recorded.keys() == task.layers.keys()
        for name, layer in task.layers.items():
            assert vars(layer) == pytest.approx(recorded[name], abs=1e-6)


def test_neither_the_data_nor_the_benchmark_is_needed(place, folder, tmp_path):
    forge_config(folder, benchmark=str(tmp_path / "gone.toml"))
    assert certify(folder).breaches == []


def forge_config(folder, **values):
    manifest = read_manifest(folder)
    manifest["config"] |= values
    write_atomically(folder / "run.json", manifest_bytes(manifest))


@pytest.mark.slow
def test_one_flipped_byte_in_any_file_is_found_and_named(folder):
    names = list(read_manifest(folder)["files"])
    assert {name.split("/")[0] for name in names} == {"tasks", "model", "metrics.json", "report.html"}
    for name in names:
        content = (folder / name).read_bytes()
        flip(folder / name)
        assert certify(folder).breaches == [f"{folder / name} is not what the run wrote: it was changed or damaged"]
        (folder / name).write_bytes(content)
    assert certify(folder).breaches == []


def test_every_damaged_file_is_named_not_only_the_first(folder):
    names = [f"{FIRST}/{WEIGHTS}", f"{SECOND}/task.json", "metrics.json", "model/config.json"]
    for name in names:
        flip(folder / name)
    (folder / "report.html").unlink()
    proof = certify(folder)
    assert len(proof.breaches) == 5
    assert all(any(name in breach for breach in proof.breaches) for name in [*names, "report.html is missing"])


def test_the_rest_is_checked_although_a_file_is_damaged(folder):
    flip(folder / SECOND / "subspace.safetensors")
    proof = certify(folder)
    assert unchecked(proof) == ["task1", "task2"]
    assert proof.tasks[0].layers
    assert proof.merge_error is None
    assert proof.notes == ["the merged model was not compared: not every task can be replayed"]
    flip(folder / "metrics.json")
    flip(folder / "model" / "model.safetensors")
    assert len(certify(folder).breaches) == 3


def test_a_damaged_model_does_not_stop_the_check_of_the_tasks(folder):
    flip(folder / "model" / "model.safetensors")
    proof = certify(folder)
    assert not unchecked(proof)
    assert len(proof.breaches) == 1
    assert proof.merge_error is None
    assert "its files are not those of the run" in proof.notes[0]


def test_a_missing_file_is_named(folder):
    (folder / FIRST / "adapter" / "adapter_config.json").unlink()
    assert breaches(folder) == f"{folder / FIRST}/adapter/adapter_config.json is missing from the run"
    assert len(Store(folder, read_manifest(folder)).damaged()) == 1


@pytest.mark.parametrize("name", [f"{FIRST}/head.safetensors", "model/model-2.safetensors", "tasks/09-x/task.json"])
def test_a_file_that_is_not_of_the_run_is_named(folder, name):
    strange = folder / name if (folder / name).parent.is_dir() else (folder / name).parent
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert breaches(folder) == f"{strange} is not of this run"


def test_other_files_at_the_top_are_nobodys_business(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"x")
    assert certify(folder).breaches == []


def protected_direction(place):
    """Return the principal input direction of a layer of the base model, `[1, d_in]`."""
    weight = load_file(place / "model" / "model.safetensors")[f"{LAYER}.weight"]
    return torch.linalg.svd(weight)[2][:1]


def test_a_swapped_adapter_that_leaks_is_found_although_its_hash_is_right(place, folder):
    def leak(tensors):
        tensors[A][:1] = protected_direction(place)

    forge_tensors(folder, f"{SECOND}/{WEIGHTS}", leak)
    found = breaches(folder)
    assert re.search(rf"task 'task1': 1 of 16 layers leak into what was protected: {LAYER} by 0\.\d+, 0.0001", found)
    assert f"{LAYER}: the recorded leak is" in found
    assert f"1 weights are not the base model's with all updates; {LAYER}.weight differs by" in found


@pytest.mark.slow
def test_a_leaking_update_is_found_although_model_and_certificate_were_forged_with_it(place, folder):
    scale = config_of(place, folder).options.alpha / 2

    def leak(tensors):
        a, b = tensors[A].clone(), tensors[B]
        tensors[A] = a + 0.5 * protected_direction(place)
        leak.change = scale * b @ (tensors[A] - a)

    def merge(tensors):
        tensors[f"{LAYER}.weight"] += leak.change

    forge_tensors(folder, f"{SECOND}/{WEIGHTS}", leak)
    forge_tensors(folder, "model/model.safetensors", merge)
    found = certify(folder)
    assert found.merge_error < 1e-6
    measured = found.tasks[1].layers[LAYER].leak

    def agree(details):
        details["certificate"]["layers"][LAYER]["leak"] = details["certificate"]["worst"]["leak"] = measured

    forge_json(folder, f"{SECOND}/task.json", agree)
    (only,) = certify(folder).breaches
    assert f"1 of 16 layers leak into what was protected: {LAYER} by {measured:.2g}" in only


@pytest.mark.parametrize(
    ("key", "value"), [("leak", 0.5), ("residual_dims", 99), ("protected_dims", 1), ("rank", 1), ("leak", None)]
)
def test_an_edited_certificate_is_a_breach(folder, key, value):
    def edit(details):
        details["certificate"]["layers"][LAYER][key] = value

    forge_json(folder, f"{FIRST}/task.json", edit)
    (only,) = certify(folder).breaches
    assert f"task 'task0': {LAYER}: the recorded {key} is {'missing' if value is None else f'{value:.4g}'}" in only


def test_a_certificate_of_other_layers_is_a_breach(folder):
    forge_json(folder, f"{FIRST}/task.json", lambda details: details["certificate"]["layers"].pop(LAYER))
    assert "task 'task0': the recorded certificate is of other layers than the 16 of the files" in breaches(folder)
    forge_json(folder, f"{FIRST}/task.json", lambda details: details.update(certificate=3))
    assert "of other layers" in breaches(folder)


def test_an_edited_worst_value_is_a_breach(folder):
    forge_json(folder, f"{FIRST}/task.json", lambda details: details["certificate"]["worst"].update(residual_dims=99))
    assert "task 'task0': the worst layer: the recorded residual_dims is 99" in breaches(folder)


def test_directions_that_are_not_orthonormal_are_found(folder):
    def stretch(tensors):
        tensors[LAYER][:, 0] *= 1.01

    forge_tensors(folder, f"{FIRST}/subspace.safetensors", stretch)
    assert f"1 of 16 layers have a basis that is not orthonormal: {LAYER} by 0.02, 0.0001 is allowed" in breaches(
        folder
    )


def test_directions_that_were_left_out_are_found_by_the_recorded_dimensions(folder):
    def shorten(tensors):
        tensors[LAYER] = tensors[LAYER][:, 1:]

    forge_tensors(folder, f"{FIRST}/subspace.safetensors", shorten)
    assert f"task 'task0': {LAYER}: the recorded residual_dims is" in breaches(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{LAYER}.weight", f"1 weights are not the base model's with all updates; {LAYER}.weight differs by 1e-05"),
        ("visual_projection.weight", "1 parameters that no task changes are not the base model's, visual_projection"),
        (f"{LAYER}.bias", f"1 parameters that no task changes are not the base model's, {LAYER}.bias first"),
    ],
)
def test_an_edited_weight_of_the_model_is_found(folder, name, expected):
    def edit(tensors):
        tensors[name].view(-1)[3] += 1e-5

    forge_tensors(folder, "model/model.safetensors", edit)
    proof = certify(folder)
    assert len(proof.breaches) == 1
    assert expected in proof.breaches[0]
    assert proof.merge_error == pytest.approx(1e-5, rel=0.05)


def test_a_model_that_was_exchanged_is_found(folder):
    forge_tensors(folder, "model/model.safetensors", lambda tensors: tensors.pop("logit_scale"))
    assert "has no weight 'logit_scale'" in breaches(folder)
    for name in list(read_manifest(folder)["files"]):
        if name.startswith("model/"):
            forge(folder, name, None)
    assert breaches(folder) == f"{folder / 'model'} is missing from the run, which was to save its model"


def test_an_adapter_on_another_layer_than_the_targets_is_found(folder):
    def move(tensors):
        other = LAYER.replace("self_attn.v_proj", "mlp.fc1")
        tensors[A.replace(LAYER, other)] = tensors.pop(A)
        tensors[B.replace(LAYER, other)] = tensors.pop(B)

    forge_tensors(folder, f"{SECOND}/{WEIGHTS}", move)
    proof = certify(folder)
    assert "task 'task1': its adapter changes vision_model.encoder.layers.1.mlp.fc1, which is no target" in str(
        proof.breaches
    )
    assert unchecked(proof) == ["task1", "task2"]


def test_an_adapter_whose_settings_merge_something_else_than_was_measured_is_found(folder):
    config = f"{SECOND}/adapter/adapter_config.json"
    forge_json(folder, config, lambda config: config.update(use_rslora=True))
    found = breaches(folder)
    assert "task 'task1': " in found
    assert "the adapter's settings make another update of it than its factors" in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors[B].fill_(float("nan")), f"its adapter is not finite in {LAYER}"),
        (lambda tensors: tensors.update({A: tensors[A][:, 1:]}), f"its adapter does not fit the weight of {LAYER}"),
        (lambda tensors: tensors.update({A: tensors[A][0]}), "cannot be checked: IndexError"),
        (lambda tensors: tensors.update({A: tensors[A][:1]}), "cannot be checked: ValueError"),
        (lambda tensors: tensors.pop(B), "cannot be checked: KeyError"),
    ],
)
def test_an_adapter_of_another_form_is_a_breach_not_a_crash(folder, change, expected):
    forge_tensors(folder, f"{SECOND}/{WEIGHTS}", change)
    proof = certify(folder)
    assert f"task 'task1'{':' if 'its' in expected else ''} {expected}" in " | ".join(proof.breaches)
    assert unchecked(proof) == ["task1", "task2"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(LAYER),
        lambda tensors: tensors.update({LAYER: tensors[LAYER][1:]}),
        lambda tensors: tensors.update({LAYER: tensors[LAYER][0]}),
        lambda tensors: tensors[LAYER].fill_(float("inf")),
    ],
)
def test_directions_of_another_form_are_a_breach_not_a_crash(folder, change):
    forge_tensors(folder, f"{SECOND}/subspace.safetensors", change)
    proof = certify(folder)
    assert "task 'task1': its directions " in proof.breaches[0]
    assert unchecked(proof) == ["task1", "task2"]


@pytest.mark.parametrize(
    "name", [f"{SECOND}/{WEIGHTS}", f"{SECOND}/subspace.safetensors", f"{SECOND}/adapter/adapter_config.json"]
)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]"])
def test_a_file_of_nonsense_is_a_breach_not_a_crash(folder, name, content):
    forge(folder, name, content)
    assert "task1" in breaches(folder)


@pytest.mark.parametrize("content", [b"", b"[1]", b"3"])
def test_a_task_file_of_nonsense_is_a_breach_not_a_crash(folder, content):
    forge(folder, f"{FIRST}/task.json", content)
    proof = certify(folder)
    assert "not everything can be checked" in proof.breaches[-1]
    assert unchecked(proof) == ["task0", "task1", "task2"]


def test_a_task_file_that_is_not_listed_leaves_its_task_unchecked(folder):
    forge(folder, f"{SECOND}/task.json", None)
    proof = certify(folder)
    assert unchecked(proof) == ["task1", "task2"]
    assert proof.breaches == [f"{folder / SECOND}/task.json is not listed in run.json, though its task is finished"]


def test_a_base_model_that_is_gone_or_another_one_is_named(place, folder, tmp_path):
    forge_config(folder, model=str(tmp_path / "gone"))
    found = certify(folder)
    assert f"model '{tmp_path / 'gone'}' is neither" in found.breaches[0]
    assert unchecked(found) == ["task0", "task1", "task2"]
    forge_config(folder, model=str(tiny.save_dual_encoder(tmp_path / "other", seed=3)))
    assert "has other weights than when" in breaches(folder)


@pytest.mark.slow
def test_a_run_that_was_cut_off_is_certified_as_far_as_it_came(place, tmp_path):
    def cut(results):
        if len(results.accuracy) == 2:
            raise CutOff

    with pytest.raises(CutOff):
        run(config_of(place, tmp_path / "cut"), watch=cut)
    proof = certify(tmp_path / "cut")
    assert proof.breaches == proof.notes == []
    assert [task.name for task in proof.tasks] == ["task0", "task1"]
    assert proof.merge_error == 0


def test_a_run_that_has_only_begun_has_its_hashes_checked(tmp_path):
    config = {"benchmark": "mini", "method": "keeplora"}
    with open_run(tmp_path / "run", config, ["task0"]) as directory:
        directory.write("metrics.json", b"{}")
        directory.commit()
    proof = certify(tmp_path / "run")
    assert (proof.breaches, proof.tasks) == ([], [])
    assert proof.notes == ["only the files' hashes were checked"]
    flip(tmp_path / "run" / "metrics.json")
    assert "metrics.json is not what the run wrote" in breaches(tmp_path / "run")


@pytest.mark.slow
def test_without_a_saved_model_the_rest_is_checked(place, tmp_path):
    run(config_of(place, tmp_path / "run", save_model=False))
    proof = certify(tmp_path / "run")
    assert proof.breaches == []
    assert proof.merge_error is None
    assert proof.notes == ["the run has no merged model (save_model = False): there is none to compare"]


@pytest.mark.slow
def test_a_trained_a_may_leak_but_not_say_otherwise(place, tmp_path):
    config = config_of(place, tmp_path / "run")
    run(replace(config, options=replace(config.options, a_training="trained")))
    proof = certify(tmp_path / "run")
    assert proof.breaches == []
    assert proof.leak_allowed == 1
    assert max(layer.leak for layer in proof.tasks[1].layers.values()) > 0.01

    def hide(details):
        for layer in [*details["certificate"]["layers"].values(), details["certificate"]["worst"]]:
            layer["leak"] = 0.0

    forge_json(tmp_path / "run", f"{SECOND}/task.json", hide)
    assert "the recorded leak is 0, the files give" in breaches(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        certify(tmp_path)


def shown(capsys, *arguments):
    """Run the command; return its exit code and what it printed, without boxes and line breaks."""
    code = 0
    try:
        cli.main(["certify", *map(str, arguments)])
    except SystemExit as ended:
        code = ended.code
    return code, " ".join(capsys.readouterr().out.split())


def test_the_command_shows_the_worst_layer_of_each_task_and_the_capacity(original, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    code, text = shown(capsys, original, "--json", tmp_path / "proof.json")
    assert code == 0
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["is_sound"]
    for task in proof["tasks"]:
        name, layer = max(task["layers"].items(), key=lambda item: item[1]["leak"])
        assert f"{task['name']} {name} {layer['leak']:.1e}" in text
        assert task["worst"]["leak"] == layer["leak"]
    assert "Merged model: is, bit by bit, the base model with all updates" in text
    assert "Remaining capacity after 3 tasks" in text
    assert "certified: no breach was found" in text


def test_the_command_shows_every_layer_when_asked(original, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, text = shown(capsys, original, "--layers")
    assert code == 0
    for name, layer in certify(original).tasks[1].layers.items():
        assert f"task1 {name} {layer.leak:.1e}" in text


def test_the_command_names_breaches_and_ends_with_1(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    flip(folder / SECOND / "task.json")
    flip(folder / "report.html")
    code, text = shown(capsys, folder, "--json", tmp_path / "proof.json")
    assert code == 1
    assert "task1 cannot be checked task2 cannot be checked" in text
    for name in (f"{SECOND}/task.json", "report.html"):
        assert f"breach: {folder / name} is not what the run wrote" in text
    assert "NOT certified" in text
    assert len(json.loads((tmp_path / "proof.json").read_text())["breaches"]) == 2


@pytest.mark.slow
def test_the_command_says_that_a_method_protects_nothing(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    run(config_of(place, tmp_path / "run", "lora_ft"))
    code, text = shown(capsys, tmp_path / "run")
    assert code == 0
    assert "lora_ft protects nothing: there is no leak to measure" in text
    assert "Remaining capacity" not in text


@pytest.mark.slow
def test_a_run_prints_the_remaining_capacity(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    cli.main(["run", "--benchmark", str(place / "colors.toml"), "--model", str(place / "model"), "--epochs", "1",
              "--batch-size", "6", "--rank", "2", "--output", str(tmp_path / "run")])  # fmt: skip
    text = " ".join(capsys.readouterr().out.split())
    assert "Remaining capacity after 3 tasks" in text
    assert forecast(certify(tmp_path / "run").capacity) in text


@pytest.mark.parametrize("error", [TypeError("ours"), AttributeError("ours"), torch.OutOfMemoryError("no memory")])
def test_a_mistake_of_ours_or_a_lack_of_memory_is_no_breach(folder, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    for name in ("updates_of", "certificates"):
        monkeypatch.setattr(verify, name, broken)
        with pytest.raises(type(error), match=str(error)):
            certify(folder)
