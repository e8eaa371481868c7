"""Loading a user's model: no code of it runs, whatever its files ask for, and what cannot be loaded is one message."""

import ast
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPForImageClassification

import chatty
import keeplora
import tiny
from keeplora.data.benchmark import read_benchmark
from keeplora.models import pretrained
from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.registry import family_of
from keeplora.progress import silent

ROOT = Path(keeplora.__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.write_benchmark(folder)
    return {kind: tiny.save_dual_encoder(folder / kind, kind) for kind in ("clip", "siglip")}


@pytest.fixture
def model(saved, tmp_path):
    return Path(shutil.copytree(saved["clip"], tmp_path / "model"))


def change(path, **values):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **values}))


def load_all(name, saved):
    """Do all that a run does to load a model and its tasks."""
    family = family_of(str(name))
    specs = read_benchmark(str(saved["clip"].parent / "colors.toml")).tasks[:1]
    family.load(str(name))
    return family.tasks(str(name), specs, batch_size=4, evaluation="test", seed=0, track=silent)


def message_of(name, saved):
    """Return the message of a model that cannot be loaded; anything but a ValueError fails."""
    try:
        load_all(name, saved)
    except ValueError as error:
        return str(error)
    return "the model loads"


def test_only_one_file_asks_transformers_and_always_forbids_code():
    found = 0
    for path in ROOT.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(call.func)):
                assert path.name == "pretrained.py", path
                assert "trust_remote_code=False" in ast.unparse(call), ast.unparse(call)
                found += 1
    assert found == 4, "config, model, tokenizer, image processor"


CODE = "from pathlib import Path\nPath(r'{mark}').write_text('ran')\nclass Any: pass\n"


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_model_runs_whatever_is_answered(model, saved, tmp_path, monkeypatch, file, known):
    mark = tmp_path / "mark"
    (model / "evil.py").write_text(CODE.format(mark=mark))
    keys = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoTokenizer", "AutoProcessor")
    change(model / file, auto_map=dict.fromkeys(keys, "evil.Any"))
    if not known:
        change(model / file, **{"config.json": {"model_type": "evil"}}.get(file, {}))
        change(model / file, **{"preprocessor_config.json": {"image_processor_type": "Evil"}}.get(file, {}))
        change(model / file, **{"tokenizer_config.json": {"tokenizer_class": "Evil"}}.get(file, {}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\ny\n"))
    assert "model" in message_of(model, saved)
    assert not mark.exists()


@pytest.mark.parametrize("attention", ["someone/kernel", "flash_attention_2", "paged|sdpa", 3])
def test_an_attention_that_a_config_asks_for_is_not_fetched(model, saved, attention):
    change(model / "config.json", _attn_implementation=attention, attn_implementation=attention)
    if (message := message_of(model, saved)) == "the model loads":
        assert pretrained.load_model(str(model)).config._attn_implementation == "sdpa"
    else:
        assert str(model) in message


def test_a_quantised_model_is_refused_before_a_library_for_it_is_looked_for(model, saved):
    change(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match="is quantised, and its weights take no update"):
        load_all(model, saved)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_refused_alone_and_beside_a_model(model, saved, beside):
    if not beside:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"is an adapter, or has one beside the model; .* format merged"):
        load_all(model, saved)


def test_a_model_for_another_purpose_is_named(tmp_path, saved):
    CLIPForImageClassification(tiny.clip_config()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="it was saved as CLIPForImageClassification, and CLIPModel is needed"):
        load_all(tmp_path / "model", saved)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_image_processor_of_another_size_is_named_before_training(saved, tmp_path, kind):
    folder = Path(shutil.copytree(saved[kind], tmp_path / "model"))
    size = {"height": 24, "width": 24}
    change(
        folder / "preprocessor_config.json", size=size if kind == "siglip" else {"shortest_edge": 24}, crop_size=size
    )
    with pytest.raises(ValueError, match="reads images of 16 x 16, and its image processor makes 24 x 24"):
        load_all(folder, saved)


ODD = [
    {"text_config": 3}, {"vision_config": []}, {"text_config": {"hidden_size": "x"}}, {"model_type": None},
    {"text_config": {"num_attention_heads": 0}}, {"vision_config": {"patch_size": 0}},
    {"vision_config": {"hidden_act": "x"}},
    {"projection_dim": -1}, {"dtype": "none"}, {"id2label": 5}, {"architectures": 7}, {"model_type": "bert"},
]  # fmt: skip


@pytest.mark.parametrize("values", ODD, ids=str)
def test_an_odd_config_is_one_message(model, saved, values):
    change(model / "config.json", **values)
    assert "model" in message_of(model, saved)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 5000])
def test_a_damaged_file_of_a_model_is_one_message(model, saved, file, content):
    (model / file).write_bytes(content)
    assert "model" in message_of(model, saved)


def test_a_mistake_of_ours_keeps_its_traceback(model, saved, monkeypatch):
    monkeypatch.setattr(DualEncoder, "load", lambda self, name: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        load_all(model, saved)


def test_the_model_is_in_float32_whatever_it_was_saved_in(model):
    tiny.clip_model().to(torch.bfloat16).save_pretrained(model)
    assert {value.dtype for value in pretrained.load_model(str(model)).parameters()} == {torch.float32}


@pytest.mark.parametrize("place", ["processor_config.json", "video_preprocessor_config.json"])
def test_settings_for_videos_are_saved_again_though_nothing_reads_them(place, tmp_path):
    model = chatty.save_image_model(tmp_path / "model", "qwen2_5_vl")
    settings = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3.0}
    if place == "processor_config.json":
        change(model / place, video_processor=settings)
    else:
        (model / place).write_text(json.dumps(settings))
    pretrained.load_processor(str(model)).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["video_processor"] == settings
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
