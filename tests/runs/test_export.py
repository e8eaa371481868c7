"""Exports: what they hold, that they work without keeplora, what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from keeplora.cli import main as cli
from keeplora.config import parse
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.registry import find_method
from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.registry import EMBEDDED, family_of
from keeplora.runs import export as export_module
from keeplora.runs.config import RunConfig
from keeplora.runs.export import ExportConfig, export_run
from keeplora.runs.exported import reopen_export
from keeplora.runs.loop import run
from keeplora.runs.manifest import read_manifest
from keeplora.runs.open import Places, reopen
from keeplora.training.trainer import TrainConfig

FORMATS = ("merged", "adapter", "adapters")
NASTY = """it's {x} | "y" """.strip()


@dataclass(frozen=True)
class Case:
    method: str = "keeplora"
    kind: str = "clip"
    options: dict | None = None
    file: str = "colors.toml"


CASES = {
    "layer_scale": Case(options={"rank": 3, "layer_scale": 0.5, "weight_energy": 0.3, "feature_energy": 0.8}),
    "reduced": Case(options={"rank": 8, "weight_energy": 0.8, "feature_energy": 0.9}),
    "heads": Case(options={"rank": 2, "classifier": "cosine", "weight_energy": 0.3, "feature_energy": 0.8}),
    "siglip": Case(
        kind="siglip", options={"rank": 2, "classifier": "cosine", "weight_energy": 0.3, "feature_energy": 0.8}
    ),
    "ensemble": Case(options={"rank": 3, "weight_energy": 0.3, "feature_energy": 0.8}, file="ensemble.toml"),
    "lora_ft": Case("lora_ft", options={"rank": 2}),
    "sd_lora": Case("sd_lora", options={"rank": 2}),
}
HALVES = ("heads", "siglip")
AUTO = ("layer_scale", "reduced")


class CutOff(Exception):
    """Ends a run on purpose."""


def config_of(place, output, case, **changes):
    kind, variant = find_method(case.method)
    values = {
        "benchmark": str(place / case.file),
        "model": str(place / case.kind),
        "method": case.method,
        "train": TrainConfig(epochs=2, batch_size=5, learning_rate=0.1),
        "options": parse(kind.Config, {**variant, **(case.options or {})}, source=case.method),
    }
    return RunConfig(**values | {"output": output} | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One run of every case, of two tasks, the second of which has a name that is hard to quote."""
    folder = tmp_path_factory.mktemp("export")
    path = tiny.write_benchmark(folder, tasks=2, per_class=4)
    path.write_text(path.read_text().replace('"task1"', f"'''{NASTY}'''"))
    ensemble = path.read_text().replace('"a drawing of a {}."', '["a drawing of a {}.", "{} photo"]')
    (folder / "ensemble.toml").write_text(ensemble)
    for kind in ("clip", "siglip"):
        tiny.save_dual_encoder(folder / kind, kind)
    for name, case in CASES.items():
        run(config_of(folder, folder / "runs" / name, case))
    return folder


def exported(place, name, target, format="merged", **options):
    return export_run(place / "runs" / name, ExportConfig(format=format, output=target, **options))


def script_of(folder):
    """Return the Python that a card shows."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.M | re.S))


ELSEWHERE = r"""
import json, os, re, sys
from peft import PeftModel
from safetensors.torch import load_file, save_file

for place in json.load(sys.stdin):
    os.chdir(place["export"])
    names = {}
    exec(place["script"], names)
    torch, model = names["torch"], names["model"]
    found = {}
    with torch.no_grad():
        for task, inputs in enumerate(place["inputs"]):
            found[f"logits{task}"] = model(**load_file(inputs)).logits_per_image
            images = [names["Image"].open(path) for path in place["images"][task]]
            found[f"images{task}"] = names["classify"](images, place["tasks"][task])[1]
    if "names" in place:
        model.set_adapter("task2")
        found["alone"] = model(**load_file(place["inputs"][0])).logits_per_image.detach()
        plain = model.merge_and_unload(adapter_names=place["names"])
        found["merged"] = plain(**load_file(place["inputs"][0])).logits_per_image.detach()
    if place["auto"]:
        from peft import AutoPeftModel
        auto = AutoPeftModel.from_pretrained(".").eval()
        found["auto"] = auto(**load_file(place["inputs"][0])).logits_per_image.detach()
    save_file({key: value.detach().contiguous() for key, value in found.items()}, place["answer"])
assert not [name for name in sys.modules if name.split(".")[0] == "keeplora"]
"""


@pytest.fixture(scope="module")
def answers(place):
    """Run every card's code in one process that knows nothing of keeplora; return its logits by case and format."""
    orders = {}
    for name in CASES:
        _, _, tasks = reopen(place / "runs" / name)
        halves = [("merged", "bfloat16")] if name in HALVES else []
        for format, dtype in [*((format, "float32") for format in FORMATS), *halves]:
            target = place / "exports" / f"{name}-{format}-{dtype}"
            card = exported(place, name, target, format, dtype=dtype)
            order = {"export": target, "script": script_of(target), "inputs": [], "images": []}
            for index, task in enumerate(tasks):
                inputs = {"pixel_values": all_of(task)["pixel_values"], **task.prompts}
                order["inputs"].append(place / f"{name}-{index}.safetensors")
                save_file(inputs, order["inputs"][-1])
                order["images"].append(sorted((place / f"data{index}" / "test").glob("*/*.png")))
            order |= {"tasks": card.results.tasks, "answer": target.with_suffix(".safetensors")}
            order |= {"names": list(card.names)} if format == "adapters" else {}
            orders[name, format, dtype] = order | {"auto": format == "adapter" and name in AUTO}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE],
        input=json.dumps(list(orders.values()), default=str), text=True, check=True, capture_output=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {key: load_file(order["answer"]) for key, order in orders.items()}


def all_of(task):
    """Return all held-out images of a task as one batch."""
    batches = list(task.test_batches())
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def outputs(model, tasks):
    with torch.no_grad():
        return [task.outputs(model, all_of(task)) for task in tasks]


def words(text):
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def without_heads(tasks):
    for task in tasks:
        task.head = None
    return tasks


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_an_export_gives_the_runs_logits_without_keeplora(place, answers, name, format):
    _, model, tasks = reopen(place / "runs" / name)
    answer = answers[name, format, "float32"]
    with_heads = outputs(model, tasks)
    untouched = outputs(DualEncoder().load(str(place / CASES[name].kind)), without_heads(tasks))
    for index, logits in enumerate(outputs(model, tasks)):
        if tasks[index].num_templates == 1:
            torch.testing.assert_close(answer[f"logits{index}"], logits, atol=1e-5, rtol=1e-5)
        assert (logits - untouched[index]).abs().max() > 0.05, "what was learned matters"
        torch.testing.assert_close(answer[f"images{index}"], with_heads[index], atol=1e-4, rtol=1e-4)
        assert (CASES[name].options or {}).get("classifier") is None or (
            (logits - with_heads[index]).abs().max() > 0.05
        ), "the head matters"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_adapters_can_be_merged_or_used_alone_as_the_card_says(place, answers, name):
    answer = answers[name, "adapters", "float32"]
    torch.testing.assert_close(answer["merged"], answer["logits0"], atol=1e-5, rtol=1e-5)
    assert (answer["alone"] - answer["logits0"]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTO)
def test_peft_finds_the_base_model_by_itself(answers, name):
    answer = answers[name, "adapter", "float32"]
    torch.testing.assert_close(answer["auto"], answer["logits0"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_the_code_of_the_card_runs_in_half_precision_too(answers, name):
    found, exact = answers[name, "merged", "bfloat16"], answers[name, "merged", "float32"]
    assert found["logits0"].dtype == torch.bfloat16
    torch.testing.assert_close(found["logits0"].float(), exact["logits0"], atol=0.5, rtol=0.05)


# Merged


@pytest.mark.slow
def test_the_merged_model_is_made_from_the_adapters_not_from_the_saved_model(place, tmp_path):
    for name in CASES:
        shutil.copytree(place / "runs" / name, tmp_path / "runs" / name)
        shutil.rmtree(tmp_path / "runs" / name / "model")
        exported(tmp_path, name, tmp_path / name)
        saved = load_file(place / "runs" / name / "model" / "model.safetensors")
        found = load_file(tmp_path / name / "model.safetensors")
        assert set(found) == set(saved)
        assert all(value.equal(saved[key]) for key, value in found.items()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_half_precision_is_a_single_cast_of_the_float32_result(place, tmp_path, format, dtype):
    for target in ("float32", dtype):
        exported(place, "layer_scale", tmp_path / target, format, dtype=target)
    files = sorted(path.relative_to(tmp_path / dtype) for path in (tmp_path / dtype).rglob("*.safetensors"))
    assert len(files) == (2 if format == "adapters" else 1)
    for file in files:
        exact, cast = load_file(tmp_path / "float32" / file), load_file(tmp_path / dtype / file)
        assert all(cast[key].equal(value.to(getattr(torch, dtype))) for key, value in exact.items())
        assert set(cast) == set(exact)


@pytest.mark.slow
def test_a_weight_too_large_for_float16_is_an_error(place, tmp_path):
    shutil.copytree(place / "clip", tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["text_model.final_layer_norm.bias"][0] = 1e5
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    run(config_of(place, tmp_path / "run", Case("zero_shot"), model=str(tmp_path / "clip")))
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias' is not finite in float16; use --dtype bfloat16"):
        export_run(tmp_path / "run", ExportConfig(format="merged", output=tmp_path / "out", dtype="float16"))
    assert not (tmp_path / "out").exists()


# Adapters


def saved_in(folder):
    config = SavedAdapter.config_from((folder / "adapter_config.json").read_bytes())
    return SavedAdapter(config, load_file(folder / "adapter_model.safetensors"))


def updates_of(place, name):
    """Return the sum of all recorded updates of every layer, in full."""
    updates = {}
    for folder in sorted((place / "runs" / name / "tasks").iterdir()):
        for layer, (a, b) in saved_in(folder / "adapter").factors().items():
            updates[layer] = updates.get(layer, 0) + b.double() @ a.double()
    return updates


def ranks_of(folder):
    return {layer: len(a) for layer, (a, _) in saved_in(folder).factors().items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_summed_adapter_is_exact_with_scaling_1_and_the_ranks_added(place, tmp_path, name):
    exported(place, name, tmp_path / "out", "adapter")
    saved = saved_in(tmp_path / "out")
    for layer, update in updates_of(place, name).items():
        a, b = saved.factors()[layer]
        torch.testing.assert_close(b @ a, update.float())
        assert saved.weights[f"base_model.model.{layer}.lora_B.weight"].equal(b), "the scaling is 1"
    recorded = [ranks_of(task / "adapter") for task in sorted((place / "runs" / name / "tasks").iterdir())]
    together = {layer: sum(ranks.get(layer, 0) for ranks in recorded) for ranks in recorded for layer in ranks}
    assert ranks_of(tmp_path / "out") == together


@pytest.mark.slow
def test_the_cases_cover_what_they_are_named_for(place, tmp_path):
    first = place / "runs" / "reduced" / "tasks" / "01-task0" / "adapter"
    assert len(set(ranks_of(first).values())) > 1
    assert saved_in(first).config.rank_pattern
    scaled = saved_in(place / "runs" / "layer_scale" / "tasks" / "01-task0" / "adapter")
    assert scaled.config.alpha_pattern
    growing = [ranks_of(task / "adapter") for task in sorted((place / "runs" / "sd_lora" / "tasks").iterdir())]
    assert set(growing[0].values()) == {2}
    assert set(growing[1].values()) == {4}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["reduced", "sd_lora"])
@pytest.mark.slow
def test_a_cut_adapter_and_its_stated_error_are_those_of_the_svd_of_the_full_update(place, tmp_path, name, rank):
    card = exported(place, name, tmp_path / "out", "adapter", rank=rank)
    factors, lost, total = saved_in(tmp_path / "out").factors(), 0.0, 0.0
    for layer, update in updates_of(place, name).items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        a, b = factors[layer]
        assert len(a) <= rank
        torch.testing.assert_close((b @ a).double(), best, atol=1e-6, rtol=1e-4)
        error = float((update - best).norm() / update.norm())
        assert card.cut.errors[layer] == pytest.approx(error, abs=1e-6)
        lost, total = lost + float((update - best).square().sum()), total + float(update.square().sum())
    assert card.cut.overall == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert card.cut.errors[card.cut.worst] == max(card.cut.errors.values()) > 0
    text = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"Cut to rank {rank}" in text
    assert f"{100 * card.cut.overall:.3g} % over all layers" in text
    assert f"{100 * card.cut.errors[card.cut.worst]:.3g} % in the worst, `{card.cut.worst}`" in text


@pytest.mark.slow
def test_a_rank_above_all_ranks_cuts_nothing(place, tmp_path):
    card = exported(place, "reduced", tmp_path / "cut", "adapter", rank=99)
    exported(place, "reduced", tmp_path / "exact", "adapter")
    assert card.cut.overall == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "exact" / weights).read_bytes()


@pytest.mark.slow
def test_the_adapters_are_those_that_were_recorded(place, tmp_path):
    exported(place, "reduced", tmp_path / "out", "adapters")
    for task in ("01-task0", f"02-{NASTY}"):
        recorded, found = place / "runs" / "reduced" / "tasks" / task / "adapter", tmp_path / "out" / task
        weights = "adapter_model.safetensors"
        assert (found / weights).read_bytes() == (recorded / weights).read_bytes()
        before, now = (json.loads((folder / "adapter_config.json").read_text()) for folder in (recorded, found))
        assert {key for key in now if now[key] != before[key]} <= {"base_model_name_or_path", "auto_mapping"}
        assert now["base_model_name_or_path"] == os.path.relpath(place / "clip", tmp_path / "out")
        assert list(now["rank_pattern"]) == list(before["rank_pattern"])


# Heads


@pytest.mark.slow
def test_heads_travel_with_their_class_names_and_prompts(place, tmp_path):
    exported(place, "heads", tmp_path / "out", "adapter")
    recorded = place / "runs" / "heads" / "tasks" / "01-task0" / "head.safetensors"
    assert (tmp_path / "out" / "heads" / "01-task0.safetensors").read_bytes() == recorded.read_bytes()
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["task0"] == {
        "class_names": ["blue", "green", "red"],
        "templates": ["a drawing of a {}."],
        "classifier": "heads/01-task0.safetensors",
    }
    assert "- task0: blue, green, red\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_an_export_needs_no_data(place, tmp_path):
    shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("data*", "exports"))
    exported(tmp_path / "place", "heads", tmp_path / "out")
    exported(place, "heads", tmp_path / "with")
    assert (tmp_path / "out" / "classes.json").read_bytes() == (tmp_path / "with" / "classes.json").read_bytes()


# The card


@pytest.mark.slow
def test_the_card_tells_tasks_in_order_scores_settings_and_licences(place, tmp_path):
    card = exported(place, "layer_scale", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    results = card.results
    rows = [line for line in text.splitlines() if line.startswith(("| task0", "| it's"))]
    assert [re.findall(r"\d+\.\d", row) for row in rows] == [
        [f"{results.zero_shot[i]:.1f}", f"{results.accuracy[i][i]:.1f}", f"{results.accuracy[-1][i]:.1f}"]
        for i in range(2)
    ]
    assert rows[1].startswith('| it\'s {x} \\| "y" |')
    assert f"Last {results.summary()['last']:.1f}" in text
    for setting in ('| method | `"keeplora"` |', "| rank | `3` |", r"| layer\_scale | `0.5` |", "| epochs | `2` |"):
        assert setting in text
    assert "keeplora does not know them" in text
    front = text.split("---\n")[1]
    assert front.startswith("library_name: transformers\n")
    assert "license" not in front
    assert "base_model" not in front, "a folder is no model of the hub, which would refuse the card"
    assert not (tmp_path / "out" / "NOTICE").exists()


@pytest.mark.slow
def test_a_model_of_the_hub_is_named_in_front_matter_and_adapter(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "locate", lambda name: "openai/clip-tiny")
    monkeypatch.setattr(DualEncoder, "load", lambda self, name: tiny.clip_model())
    exported(place, "reduced", tmp_path / "out", "adapter")
    front = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert 'base_model: "openai/clip-tiny"\nbase_model_relation: adapter\nlibrary_name: peft\n' in front
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "openai/clip-tiny"


@pytest.mark.slow
def test_what_came_with_keeplora_takes_its_notice_along(place, tmp_path, monkeypatch):
    monkeypatch.setitem(EMBEDDED, "mini", place / "clip")
    run(config_of(place, tmp_path / "run", Case(options={"rank": 2}), model="mini"))
    export_run(tmp_path / "run", ExportConfig(format="adapter", output=tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "NOTICE").read_bytes() == export_module.NOTICE.read_bytes()
    assert "the weights of the base model are under Apache-2.0" in text
    assert "keeplora does not know the licence of\nthe training data" in text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == os.path.relpath(place / "clip", tmp_path / "out")


# Other runs


@pytest.mark.slow
def test_a_run_that_is_not_finished_exports_what_is_and_says_so(place, tmp_path, capsys):
    def cut(results):
        if len(results.accuracy) == 1:
            raise CutOff

    with pytest.raises(CutOff):
        run(config_of(place, tmp_path / "run", Case(options={"rank": 2}), save_model=False), watch=cut)
    cli.main(["export", str(tmp_path / "run"), "--format", "adapters", "--output", str(tmp_path / "out")])
    shown = words(capsys.readouterr().out)
    assert "Exported 1 of 2 tasks" in shown
    assert f"The run is not finished; not in the export: {NASTY}" in shown
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"1 of 2 tasks are learned; not in here: {export_module.as_prose(NASTY)}" in text
    assert text.count("not learned |") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "01-task0",
        "README.md",
        "classes.json",
        "export.json",
    ]


@pytest.mark.slow
def test_zero_shot_merges_to_the_base_model_and_has_no_adapter(place, tmp_path):
    run(config_of(place, tmp_path / "run", Case("zero_shot")))
    export_run(tmp_path / "run", ExportConfig(format="merged", output=tmp_path / "out"))
    base = load_file(place / "clip" / "model.safetensors")
    assert all(value.equal(base[key]) for key, value in load_file(tmp_path / "out" / "model.safetensors").items())
    for format in ("adapter", "adapters"):
        with pytest.raises(ValueError, match="zero_shot, which leaves no adapter; use --format merged"):
            export_run(tmp_path / "run", ExportConfig(format=format, output=tmp_path / format))


@pytest.mark.slow
def test_joint_training_has_one_adapter_for_all_tasks(place, tmp_path):
    run(config_of(place, tmp_path / "run", Case("joint", options={"rank": 2})))
    card = export_run(tmp_path / "run", ExportConfig(format="adapters", output=tmp_path / "out"))
    assert card.folders == {"task0": "01-task0"}
    assert "All tasks were learned at once" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_updates_that_depend_on_the_input_are_refused(place, tmp_path, format):
    run(config_of(place, tmp_path / "run", Case("cl_moe", options={"rank": 2, "num_experts": 3}), first_tasks=1))
    with pytest.raises(ValueError, match="learned by cl_moe, whose updates depend on the input and stay beside"):
        export_run(tmp_path / "run", ExportConfig(format=format, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# What is refused


def test_wrong_settings_are_errors(tmp_path):
    with pytest.raises(ValueError, match="rank = 4 is for format 'adapter'; leave it out for format 'merged'"):
        ExportConfig(format="merged", output=tmp_path, rank=4)
    with pytest.raises(ValueError, match="rank = 0: Input should be greater than 0"):
        ExportConfig(format="adapter", output=tmp_path, rank=0)
    with pytest.raises(ValueError, match="format = 'onnx' is unknown; choose from merged, adapter, adapters"):
        ExportConfig(format="onnx", output=tmp_path)


@pytest.mark.slow
def test_an_output_with_other_things_is_refused(place, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty; give another --output"):
        exported(place, "reduced", tmp_path)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file; give another --output"):
        exported(place, "reduced", tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_an_empty_output_is_used(place, tmp_path, monkeypatch):
    for name in ("named", "here"):
        (tmp_path / name).mkdir()
    exported(place, "reduced", tmp_path / "named", "adapter")
    monkeypatch.chdir(tmp_path / "here")
    exported(place, "reduced", Path("."), "adapter")
    for name in ("named", "here"):
        assert (tmp_path / name / "README.md").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "named"]


@pytest.mark.slow
def test_what_is_no_run_or_has_no_finished_task_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        export_run(tmp_path, ExportConfig(format="merged", output=tmp_path / "out"))

    def cut(results):
        raise CutOff

    with pytest.raises(CutOff):
        run(config_of(place, tmp_path / "run", Case()), watch=cut)
    with pytest.raises(ValueError, match="nothing to export: no task is finished"):
        export_run(tmp_path / "run", ExportConfig(format="merged", output=tmp_path / "out"))


@pytest.mark.parametrize("damaged", ["adapter/adapter_model.safetensors", "task.json", "head.safetensors"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_a_damaged_run_is_refused(place, tmp_path, format, damaged):
    shutil.copytree(place / "runs" / "heads", tmp_path / "run")
    path = tmp_path / "run" / "tasks" / "01-task0" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match="was changed or damaged"):
        export_run(tmp_path / "run", ExportConfig(format=format, output=tmp_path / "out"))
    path.unlink()
    with pytest.raises(ValueError, match="is missing from the run"):
        export_run(tmp_path / "run", ExportConfig(format=format, output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_an_export_that_breaks_off_leaves_nothing(place, tmp_path, monkeypatch, format):
    def broken(card):
        raise CutOff

    monkeypatch.setattr(export_module, "render_card", broken)
    with pytest.raises(CutOff):
        exported(place, "heads", tmp_path / "deep" / "out", format)
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.slow
def test_an_export_holds_safetensors_json_and_text_and_leaves_the_run_alone(place, tmp_path, format):
    before = tiny.tree(place / "runs" / "heads")
    exported(place, "heads", tmp_path / "out", format)
    assert tiny.tree(place / "runs" / "heads") == before
    assert read_manifest(place / "runs" / "heads")["phase"] == "complete"
    files = tiny.tree(tmp_path / "out")
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".md"}
    assert not any(content.startswith((b"\x80", b"PK")) for content in files.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_equal_exports_have_equal_bytes(place, tmp_path):
    for format in FORMATS:
        for again in ("a", "b"):
            exported(place, "reduced", tmp_path / again / format, format)
    assert tiny.tree(tmp_path / "a") == tiny.tree(tmp_path / "b")


@pytest.mark.slow
def test_the_command_says_what_a_cut_lost_and_refuses_in_one_message(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["export", str(place / "runs" / "reduced"), "--format", "adapter", "--rank", "2", "--dtype", "bfloat16"]
    cli.main([*arguments, "--output", str(tmp_path / "out")])
    shown = words(capsys.readouterr().out)
    assert "Exported 2 of 2 tasks" in shown
    assert re.search(r"Cut to rank 2: relative error [\d.]+ % over all layers, [\d.]+ % in the worst, \w+_model", shown)
    assert f"Card: {tmp_path}/out/README.md" in shown
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--output", str(tmp_path / "out")])
    assert "out is not empty" in capsys.readouterr().err


FOREIGN = "</td><script>alert(1)</script> | [a](http://b) `c` *d* _e_ <!-- "


def test_text_from_elsewhere_is_shown_and_not_obeyed():
    for text in (FOREIGN, "a`b``c", "a\nb", "| x |", "&lt;"):
        prose, code = export_module.as_prose(text), export_module.as_code(text)
        assert "\n" not in prose + code
        assert "<" not in prose
        assert not re.search(r"(?<!\\)[|`*_\[\]]", prose)
        assert not re.search(r"(?<!\\)\|", code)
        fence = re.match("`+", code)[0]
        assert code.count(fence) == 2 or fence * 2 not in code[len(fence) : -len(fence)]


@pytest.mark.slow
def test_nothing_of_an_export_or_of_a_runs_scores_names_a_folder_of_this_machine(place, tmp_path):
    run(config_of(place, tmp_path / "run", Case()))
    for kind in ("merged", "adapter", "adapters"):
        export_run(tmp_path / "run", ExportConfig(format=kind, output=tmp_path / kind))
    texts = [path for kind in ("merged", "adapter", "adapters") for path in (tmp_path / kind).rglob("*")]
    texts += [
        tmp_path / "run" / "metrics.json",
        tmp_path / "run" / "report.html",
        *(tmp_path / "run").rglob("adapter_config.json"),
    ]
    for path in texts:
        if path.is_file() and path.suffix in (".json", ".md", ".html"):
            text = path.read_text()
            assert str(tmp_path) not in text, path
            assert str(place) not in text, path


@pytest.mark.slow
def test_the_card_of_a_cut_adapter_has_the_scores_of_what_was_written(place, tmp_path):
    card = exported(place, "reduced", tmp_path / "out", "adapter", rank=1)
    directory, _, tasks = reopen(place / "runs" / "reduced")
    base = family_of(directory.manifest["config"]["model"]).load(directory.manifest["config"]["model"])
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert card.cut_scores == pytest.approx(evaluate(model, tasks))
    text = (tmp_path / "out" / "README.md").read_text()
    for score in card.cut_scores:
        assert re.search(rf"\| {score:.1f} \|$", text, re.MULTILINE)
    assert "the others are those of the exact model" in text


# Evaluated again


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["reduced", "heads", "siglip", "ensemble"])
def test_an_export_is_evaluated_to_the_scores_of_its_run_wherever_all_lies(place, tmp_path, capsys, name, format):
    exported(place, name, tmp_path / "a" / "out", format)
    told, _, model, tasks = reopen_export(tmp_path / "a" / "out")
    _, whole, own = reopen(place / "runs" / name)
    assert (scores := evaluate(model, tasks)) == pytest.approx(evaluate(whole, own))
    assert scores == pytest.approx(told.scores)
    for mine, other in zip(outputs(model, tasks), outputs(whole, own), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert str(tmp_path) not in (tmp_path / "a" / "out" / "export.json").read_text()
    shutil.move(tmp_path / "a" / "out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"colors\.toml|ensemble\.toml is not there any more; say with --benchmark"):
        reopen_export(tmp_path / "out")
    if format == "merged":
        cli.main(["evaluate", str(tmp_path / "out"), "--benchmark", str(place / CASES[name].file)])
        assert f"exported ({format})" in words(capsys.readouterr().out)


@pytest.mark.slow
def test_the_scores_of_a_cut_export_are_its_own(place, tmp_path):
    card = exported(place, "reduced", tmp_path / "out", "adapter", rank=1)
    told, _, model, tasks = reopen_export(tmp_path / "out")
    assert told.scores == card.cut_scores == pytest.approx(evaluate(model, tasks))


@pytest.mark.slow
def test_what_an_export_was_trained_on_or_never_knew_is_refused(place, tmp_path):
    exported(place, "reduced", tmp_path / "out")
    with pytest.raises(ValueError, match="task 'task0' has no validation split: a fifth of its training images"):
        reopen_export(tmp_path / "out", split="validation")
    other = place / "other.toml"
    other.write_text((place / "colors.toml").read_text().replace('"task0"', '"other"'))
    with pytest.raises(ValueError, match=r"other\.toml is not what .*out was begun with"):
        reopen_export(tmp_path / "out", places=Places(other))
    other.unlink()
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    for key in told:
        (tmp_path / "out" / "export.json").write_text(json.dumps({name: told[name] for name in told if name != key}))
        with pytest.raises(ValueError, match=r"export\.json is damaged or not of keeplora: .*" + key):
            reopen_export(tmp_path / "out")
    for key in told["config"]:
        config = {name: told["config"][name] for name in told["config"] if name != key}
        (tmp_path / "out" / "export.json").write_text(json.dumps({**told, "config": config}))
        with suppress(ValueError):  # Never another error; some keys have a default.
            reopen_export(tmp_path / "out")


def forged_export(place, tmp_path, format, name, change):
    """Export a run, and change one of its files."""
    out = tmp_path / "out"
    exported(place, name, out, format)
    change(out)
    return out


def told_with(**changes):
    def change(out):
        told = json.loads((out / "export.json").read_text())
        (out / "export.json").write_text(json.dumps({**told, **changes}))

    return change


def without_a_layer(out):
    weights = load_file(out / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), out / "adapter_model.safetensors")


def pissa(out):
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))


def cut_short(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:80])


def another_head(out):
    save_file({"weight": torch.ones(2, 10)}, out / "heads" / "01-task0.safetensors")


FORGED = {
    "head outside": ("merged", "heads", told_with(heads={"task0": "/etc/hostname"}), "which is not in"),
    "head above": ("merged", "heads", told_with(heads={"task0": "../x"}), "names '../x', which is not in"),
    "adapter above": ("adapters", "reduced", told_with(adapters=["../out"]), "names '../out', which is not in"),
    "a layer less": ("adapter", "reduced", without_a_layer, "is missing, or one too many"),
    "another start": ("adapter", "reduced", pissa, "init_lora_weights = 'pissa'"),
    "adapter cut short": ("adapter", "reduced", cut_short("adapter_model.safetensors"), "or is damaged"),
    "head cut short": ("merged", "heads", cut_short("heads/01-task0.safetensors"), "01-task0.safetensors is damaged"),
    "another head": ("merged", "heads", another_head, "is not the classifier of 3 classes"),
    "a score less": ("merged", "reduced", told_with(scores=[1.0]), "its benchmarks have others, or more"),
    "a link": ("merged", "reduced", lambda out: (out / "x").symlink_to("/etc/hostname"), "is a symbolic link"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # PEFT's, before our error
@pytest.mark.parametrize("kind", FORGED)
def test_an_export_that_was_changed_or_damaged_is_refused_with_a_message(place, tmp_path, kind):
    format, name, change, message = FORGED[kind]
    with pytest.raises(ValueError, match=message):
        reopen_export(forged_export(place, tmp_path, format, name, change))


@pytest.mark.slow
def test_an_export_of_changed_data_is_refused(place, tmp_path):
    exported(place, "reduced", tmp_path / "out")
    for split in ("train", "test"):
        shutil.copytree(place / "data0" / split / "red", place / "data0" / split / "pink")
    try:
        with pytest.raises(ValueError, match=r"its data are not those that .*out was begun with \(new classes: pink\)"):
            reopen_export(tmp_path / "out")
        with pytest.raises(ValueError, match="new classes: pink"):
            exported(place, "reduced", tmp_path / "cut", "adapter", rank=1)
    finally:
        for split in ("train", "test"):
            shutil.rmtree(place / "data0" / split / "pink")


@pytest.mark.slow
def test_a_base_model_that_moved_is_found_where_the_adapter_says(place, tmp_path):
    exported(place, "reduced", tmp_path / "deep" / "er" / "out", "adapter")
    out = Path(shutil.move(tmp_path / "deep" / "er" / "out", tmp_path / "out"))
    with pytest.raises(ValueError, match="is neither an embedded model"):
        reopen_export(out, places=Places(place / "colors.toml"))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(place / "clip")}))
    told, _, model, tasks = reopen_export(out, places=Places(place / "colors.toml"))
    assert evaluate(model, tasks) == pytest.approx(told.scores)


@pytest.mark.slow
def test_an_export_tells_nothing_of_where_data_lay(place, tmp_path):
    shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("exports", "runs"))
    path = tmp_path / "place" / "colors.toml"
    path.write_text(path.read_text().replace('path = "data', f'path = "{tmp_path}/place/data'))
    run(config_of(tmp_path / "place", tmp_path / "run", CASES["reduced"]))
    export_run(tmp_path / "run", ExportConfig(format="merged", output=tmp_path / "out"))
    assert all(str(tmp_path) not in file.read_text() for file in (tmp_path / "out").glob("*.json"))
    told, _, model, tasks = reopen_export(tmp_path / "out")
    assert evaluate(model, tasks) == pytest.approx(told.scores)
