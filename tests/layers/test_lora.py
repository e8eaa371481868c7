import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from keeplora.layers import lora, merging
from keeplora.layers.names import tower_share
from keeplora.methods.keeplora import KeepLoRAConfig
from tiny import (
    MLP,
    TokenTask,
    VectorTask,
    classification_task,
    clip_model,
    llama_model,
    siglip_model,
    train,
    write_adapter,
)

RANKS = {"fc1": 3, "fc2": 2, "out": 4}
ALPHAS = {"fc1": 1.0, "fc2": 0.5, "out": 6.0}


def random_factors(model, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_submodule(name).weight.shape for name in ranks}
    return {
        name: (
            torch.randn(r, shapes[name][1], generator=generator),
            0.1 * torch.randn(shapes[name][0], r, generator=generator),
        )
        for name, r in ranks.items()
    }


def logits(model, task):
    with torch.no_grad():
        return task.outputs(model.eval(), next(iter(task.batches())))


# Targets


def test_targets_are_linear_layers_by_name_or_end_of_name_in_the_models_order():
    model = llama_model()
    names = lora.linear_targets(model, ("v_proj", "q_proj", "layers.0.mlp.up_proj"))
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert lora.linear_targets(MLP(), ("out",)) == ["out"]


def test_a_suffix_ends_at_a_dot():
    model = nn.ModuleDict({"proj": nn.Linear(3, 4), "q_proj": nn.Linear(3, 4)})
    assert lora.linear_targets(model, ("proj",)) == ["proj"]


def test_the_output_layer_of_multihead_attention_is_left_out():
    model = siglip_model()
    assert isinstance(model.get_submodule("vision_model.head.attention.out_proj"), nn.Linear)
    names = lora.linear_targets(model, ("out_proj",))
    assert len(names) == 4, "two blocks in each of two towers"
    assert not any("head" in name for name in names)


def test_no_matching_layer_is_an_error_that_lists_the_names_there_are():
    with pytest.raises(ValueError, match="named w_q or w_k; set targets to some of: fc1, fc2, out"):
        lora.linear_targets(MLP(), ("w_q", "w_k"))
    with pytest.raises(ValueError, match="some of: none"):
        lora.linear_targets(nn.Sequential(nn.ReLU()), ("q_proj",))


# Attaching


def test_each_layer_has_its_own_rank_and_alpha():
    model, task = MLP(), VectorTask()
    rows = task.data[0][0]
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in RANKS}
    factors = random_factors(model, RANKS)
    adapted = lora.attach(model, RANKS, ALPHAS, factors=factors)
    reference = MLP()
    for name, (a, b) in factors.items():
        layer = lora.lora_layers(adapted)[name]
        assert layer.lora_A["default"].weight.equal(a)
        assert layer.lora_B["default"].weight.equal(b)
        assert not layer.lora_A["default"].weight.requires_grad
        assert layer.lora_B["default"].weight.requires_grad
        with torch.no_grad():
            reference.get_submodule(name).weight.copy_(weights[name] + ALPHAS[name] / RANKS[name] * b @ a)
    torch.testing.assert_close(adapted(rows), reference(rows), atol=1e-5, rtol=1e-5)


def test_only_the_adapter_is_trained():
    adapted = lora.attach(MLP(), RANKS, ALPHAS, factors=random_factors(MLP(), RANKS))
    trained = {name.rsplit("base_model.model.")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_B.default.weight" for name in RANKS}
    both = lora.attach(MLP(), RANKS, ALPHAS)
    assert sum(p.requires_grad for p in both.parameters()) == 6


def test_a_layer_whose_name_ends_in_a_targets_name_is_not_adapted_unasked():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.inner = nn.ModuleDict({"fc": nn.Linear(4, 5)})

    adapted = lora.attach(Nested(), {"fc": 2}, {"fc": 1.0})
    assert set(lora.lora_layers(adapted)) == {"fc"}


def test_ranks_of_layers_whose_names_end_alike_are_told_apart():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.inner = nn.ModuleDict({"fc": nn.Linear(4, 5)})
            self.other = nn.Linear(6, 7)

    ranks, alphas = {"other": 1, "fc": 2, "inner.fc": 3}, {"other": 1.0, "fc": 3.0, "inner.fc": 0.5}
    layers = lora.lora_layers(lora.attach(Nested(), ranks, alphas))
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {name: layer.scaling["default"] * ranks[name] for name, layer in layers.items()} == pytest.approx(alphas)


class Nested(nn.Module):
    """A layer whose name ends in another's, with the rank of the first layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 5)})
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.inner["fc"](x))


@pytest.mark.parametrize("ranks", [{"inner.fc": 2, "fc": 3}, {"fc": 3, "inner.fc": 2}])
def test_ranks_of_namesakes_survive_saving_and_loading(ranks, tmp_path):
    alphas = {"inner.fc": 5.0, "fc": 0.5}
    adapted = lora.attach(Nested(), ranks, alphas, factors=random_factors(Nested(), ranks))
    folder = write_adapter(tmp_path / "adapter", lora.detach(adapted))
    rows = torch.randn(6, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(Nested(), folder)(rows), adapted(rows))


def test_the_base_model_is_named_and_the_factors_cast_in_a_copy():
    saved = lora.detach(lora.attach(MLP(), RANKS, ALPHAS, factors=random_factors(MLP(), RANKS)))
    before = saved.files()
    changed = saved.based_on(MLP(), "somewhere").cast(torch.bfloat16)
    config = json.loads(changed.files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "somewhere"
    assert config["auto_mapping"] == {"base_model_class": "MLP", "parent_library": "tiny"}
    for name, value in changed.weights.items():
        assert value.equal(saved.weights[name].to(torch.bfloat16))
    assert saved.files() == before


def test_factors_of_gives_the_update():
    adapted = lora.attach(MLP(), RANKS, ALPHAS, factors=random_factors(MLP(), RANKS))
    factors = lora.factors_of(adapted)
    before = {name: MLP().get_submodule(name).weight.detach() for name in RANKS}
    merged = merging.merge(adapted)
    for name, (a, b) in factors.items():
        change = merged.get_submodule(name).weight.detach() - before[name]
        torch.testing.assert_close(b @ a, change, atol=1e-6, rtol=0)


# Saving


BUILDS = {
    "mlp": (MLP, VectorTask, ("fc1", "fc2", "out")),
    "clip": (clip_model, classification_task, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "siglip": (siglip_model, lambda: classification_task(kind="siglip"), ("q_proj", "v_proj", "out_proj")),
    "llama": (llama_model, TokenTask, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")),
}


def trained(build, task, targets):
    model = build()
    names = lora.linear_targets(model, targets)
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    alphas = {name: 1.0 + i % 2 for i, name in enumerate(names)}
    adapted = lora.attach(model, ranks, alphas, factors=random_factors(model, ranks))
    train(adapted, task, epochs=1, lr=0.01)
    return adapted


@pytest.mark.parametrize("kind", BUILDS)
def test_a_saved_adapter_reloads_in_plain_peft_with_the_same_logits(kind, tmp_path):
    build, make_task, targets = BUILDS[kind]
    adapted = trained(build, make_task(), targets)
    folder = write_adapter(tmp_path / "adapter", lora.detach(adapted))
    wanted = logits(adapted, make_task())
    assert not torch.allclose(wanted, logits(build(), make_task()), atol=1e-2), "the adapter matters"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build(), folder), make_task()), wanted)
    merged = merging.merge_from(build(), folder)
    torch.testing.assert_close(logits(merged, make_task()), wanted, atol=1e-5, rtol=1e-5)


def test_adapters_of_many_layers_but_not_all_adapt_exactly_theirs_together(tmp_path):
    """From 20 targets on PEFT shortens their names to common endings."""
    names = lora.linear_targets(clip_model(layers=5), ("q_proj", "v_proj", "out_proj"))
    one, two = names[3:], [*names[:4], *names[7:]]
    assert min(len(one), len(two)) >= 20
    plain = clip_model(layers=5)
    for number, chosen in enumerate((one, two)):
        ranks = {name: 2 + i % 3 for i, name in enumerate(chosen)}
        alphas = {name: 1.0 + i % 2 for i, name in enumerate(chosen)}
        factors = random_factors(clip_model(layers=5), ranks, seed=number)
        adapted = lora.attach(clip_model(layers=5), ranks, alphas, factors=factors)
        saved = lora.detach(adapted)
        write_adapter(tmp_path / str(number), saved)
        for name, (a, b) in saved.factors().items():
            plain.get_submodule(name).weight.data += b @ a
    model = PeftModel.from_pretrained(clip_model(layers=5), tmp_path / "0", adapter_name="one")
    assert set(lora.lora_layers(model)) == set(one)
    model.load_adapter(tmp_path / "1", adapter_name="two")
    layers = lora.lora_layers(model)
    assert {name for name, layer in layers.items() if "one" in layer.r} == set(one)
    assert {name for name, layer in layers.items() if "two" in layer.r} == set(two)
    model.base_model.set_adapter(["one", "two"])
    together, wanted = logits(model, classification_task()), logits(plain, classification_task())
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BUILDS)
def test_merging_keeps_the_logits_and_leaves_a_plain_model(kind):
    build, make_task, targets = BUILDS[kind]
    adapted = trained(build, make_task(), targets)
    wanted = logits(adapted, make_task())
    merged = merging.merge(adapted)
    torch.testing.assert_close(logits(merged, make_task()), wanted, atol=1e-5, rtol=1e-5)
    assert type(merged) is type(build())
    assert list(merged.state_dict()) == list(build().state_dict())


def test_a_merge_that_would_not_be_finite_is_an_error():
    factors = random_factors(MLP(), RANKS)
    factors["fc2"][1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        merging.merge(lora.attach(MLP(), RANKS, ALPHAS, factors=factors))


def test_equal_adapters_have_equal_bytes_and_different_ones_do_not():
    first, again, other = (
        lora.detach(lora.attach(MLP(), RANKS, ALPHAS, factors=random_factors(MLP(), RANKS, seed))).files()
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["adapter_config.json"] == other["adapter_config.json"]
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_files_are_safetensors_and_json_and_hold_the_factors():
    factors = random_factors(MLP(), RANKS)
    files = lora.detach(lora.attach(MLP(), RANKS, ALPHAS, factors=factors)).files()
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    weights = load(files["adapter_model.safetensors"])
    assert len(weights) == 6
    for name, (a, b) in factors.items():
        assert weights[f"base_model.model.{name}.lora_A.weight"].equal(a)
        assert weights[f"base_model.model.{name}.lora_B.weight"].equal(b)
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == ["fc1", "fc2", "out"]
    read = lora.SavedAdapter.config_from(files["adapter_config.json"])
    assert read.rank_pattern == {"fc2": 2, "out": 4}


def test_a_detached_adapter_does_not_change_with_the_model():
    adapted = lora.attach(MLP(), RANKS, ALPHAS, factors=random_factors(MLP(), RANKS))
    saved = lora.detach(adapted)
    before = saved.files()
    train(adapted, VectorTask(), epochs=1)
    assert saved.files() == before
    assert lora.detach(adapted).files() != before


BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def llava():
    text = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "projection_dim": 16}  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=30, image_seq_length=4
    )
    return LlavaForConditionalGeneration(config)


def test_targets_of_a_vision_language_model_are_in_the_language_model_unless_asked():
    model, language = llava(), "model.language_model.layers."
    assert lora.linear_targets(model, ("auto",)) == [f"{language}{i}.{name}" for i in range(2) for name in BLOCK]
    assert lora.linear_targets(model, ("q_proj",)) == [f"{language}{i}.self_attn.q_proj" for i in range(2)]
    towers = {tower: lora.linear_targets(model, ("auto",), (tower,)) for tower in ("vision", "projector", "language")}
    assert {len(found) for found in towers.values()} == {12, 2, 14}
    assert all("vision_tower" in name for name in towers["vision"])
    assert towers["projector"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    assert lora.linear_targets(model, ("q_proj",), ("vision",)) == [
        f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    both = lora.linear_targets(model, ("auto",), ("vision", "language"))
    assert set(both) == {*towers["vision"], *towers["language"]}
    with pytest.raises(ValueError, match="no linear layer is named out_proj in language; set targets to some of: down"):
        lora.linear_targets(model, ("out_proj",), ("language",))


def test_layers_of_another_kind_are_named():
    config = GPT2Config(vocab_size=40, n_embd=12, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"no linear layer is named auto.*its Conv1D layers are no nn.Linear"):
        lora.linear_targets(GPT2LMHeadModel(config), ("auto",))


@pytest.mark.parametrize(
    ("name", "share"),
    [("vision_model.encoder.layers.0.self_attn.q_proj", 0.85), ("text_model.encoder.layers.0.self_attn.q_proj", 0.2),
     ("model.text_model.layers.0.self_attn.q_proj", 0.6), ("model.layers.0.mlp.up_proj", 0.6),
     ("model.language_model.layers.1.mlp.down_proj", 0.6), ("model.visual.blocks.0.attn.qkv", 0.85),
     ("model.multi_modal_projector.linear_1", 0.6)],
)  # fmt: skip
def test_the_default_energies_are_those_of_the_towers(name, share):
    assert tower_share(name, KeepLoRAConfig().weight_energy) == share
