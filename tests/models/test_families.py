import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from keeplora.data.benchmark import read_benchmark
from keeplora.models.dual_encoder import tokenise
from keeplora.models.registry import FAMILIES, family_of
from keeplora.progress import silent
from tiny import classification_task, save_dual_encoder, siglip_model, tokenizer, write_benchmark


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def stored(request, tmp_path_factory):
    """The folder of a saved model of every family, and a benchmark for it."""
    folder = tmp_path_factory.mktemp(request.param)
    benchmark = read_benchmark(str(write_benchmark(folder)))
    return str(save_dual_encoder(folder / "model", request.param)), benchmark.tasks


def tasks_of(stored, batch_size=5):
    model, specs = stored
    return family_of(model).tasks(model, specs, batch_size=batch_size, evaluation="test", seed=0, track=silent)


def normalised(output):
    return F.normalize(getattr(output, "pooler_output", output).double(), dim=-1)


def test_family_is_found_by_its_folder_and_loads_in_float32(stored):
    model = family_of(stored[0]).load(stored[0])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.training


def test_an_unknown_model_or_type_is_an_error_that_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"model '.*nowhere' is neither an embedded model \(mini\)"):
        family_of(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is of type 'bert'; known types: clip, siglip"):
        family_of(str(tmp_path))


def test_loss_is_the_mean_cross_entropy_over_the_class_prompts_at_the_models_scale(stored):
    model, task = family_of(stored[0]).load(stored[0]), tasks_of(stored)[0]
    batch = next(iter(task.batches()))
    with torch.no_grad():
        images = normalised(model.get_image_features(pixel_values=batch["pixel_values"]))
        losses = []
        for image, label in zip(images, batch["labels"], strict=True):
            scores = []
            for row in range(3):
                prompt = {key: value[row : row + 1] for key, value in task.prompts.items()}
                text = normalised(model.get_text_features(**prompt))[0]
                scores.append(float(model.logit_scale.double().exp() * image @ text))
            losses.append(float(torch.logsumexp(torch.tensor(scores, dtype=torch.float64), 0)) - scores[label])
        assert float(task.loss(model, batch)) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert task.weight(batch) == 5


def test_evaluation_encodes_the_prompts_once_and_answers_as_before(stored):
    model, task = family_of(stored[0]).load(stored[0]), tasks_of(stored)[0]
    calls = []
    hook = model.text_model.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        batches = list(task.test_batches())
        before = [task.outputs(model, batch) for batch in batches]
        calls.clear()
        with task.frozen(model):
            inside = [task.outputs(model, batch) for batch in batches]
        assert len(batches) > 1
        assert len(calls) == 1
        embeddings = next(model.text_model.parameters())
        embeddings.add_(torch.randn_like(embeddings))
        with task.frozen(model):
            after = task.outputs(model, batches[0])
    hook.remove()
    for ours, wanted in zip(inside, before, strict=True):
        # A model may add the same bias to every class.
        torch.testing.assert_close(ours.softmax(-1), wanted.softmax(-1), atol=1e-5, rtol=0)
    assert not torch.allclose(after, inside[0], atol=1e-3), "nothing is kept from before"


def test_training_reaches_both_towers(stored):
    model, task = family_of(stored[0]).load(stored[0]), tasks_of(stored)[0]
    task.loss(model, next(iter(task.batches()))).backward()
    for tower in ("vision_model", "text_model"):
        weight = model.get_submodule(f"{tower}.encoder.layers.0.self_attn.q_proj").weight
        assert float(weight.grad.abs().max()) > 0


def test_tasks_are_read_in_an_order_that_follows_from_the_seed(stored):
    first, again = (
        [batch["labels"].tolist() for task in tasks_of(stored) for _ in range(2) for batch in task.batches()]
        for _ in range(2)
    )
    assert first == again
    half = len(first) // 4
    assert first[:half] != first[half : 2 * half], "a new order every epoch"


def test_a_saved_model_is_loaded_by_from_pretrained_with_its_tokenizer(stored, tmp_path):
    family = family_of(stored[0])
    model = family.load(stored[0])
    with torch.no_grad():
        model.text_projection.weight.mul_(2) if hasattr(model, "text_projection") else model.logit_scale.add_(1)
    family.save(model, stored[0], tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    for (name, value), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert value.equal(loaded), name
    words = AutoTokenizer.from_pretrained(tmp_path / "saved")("a red thing")["input_ids"]
    assert words == AutoTokenizer.from_pretrained(stored[0])("a red thing")["input_ids"]
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert family_of(str(tmp_path / "saved")).tasks(
        str(tmp_path / "saved"), stored[1], batch_size=4, evaluation="test", seed=0, track=silent
    )


def test_prompts_are_padded_only_as_far_as_the_longest_needs():
    prompts = tokenise(tokenizer(), ["a red thing", "a big dark blue thing"], "colors")
    assert prompts["input_ids"].shape == (2, 7)
    assert prompts["attention_mask"].sum(1).tolist() == [5, 7]
    full = tokenise(tokenizer(masked=False), ["a red thing", "a big dark blue thing"], "colors")
    assert full["input_ids"].shape == (2, 12), "a model without a mask was trained at full length"
    assert "attention_mask" not in full


def test_a_prompt_longer_than_the_context_is_an_error():
    with pytest.raises(ValueError, match="'colors': a prompt has 15 tokens, the model's context 12"):
        tokenise(tokenizer(), ["a " * 13], "colors")


def test_cutting_prompts_to_the_longest_changes_no_feature(stored):
    model, name = family_of(stored[0]).load(stored[0]), stored[0]
    words = AutoTokenizer.from_pretrained(name)
    if "attention_mask" not in words.model_input_names:
        pytest.skip("reads its answer at the last position, so prompts are not cut")
    texts = ["a photo of a red thing.", "a drawing of a big dark blue thing."]
    short = tokenise(words, texts, "colors")
    long = words(texts, padding="max_length", return_tensors="pt")
    assert short["input_ids"].shape[1] < long["input_ids"].shape[1]
    with torch.no_grad():
        ours, wanted = (
            normalised(model.get_text_features(input_ids=p["input_ids"], attention_mask=p["attention_mask"]))
            for p in (short, long)
        )
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_real_rows_mask_the_text_tower_only():
    task = classification_task()
    batch = next(iter(task.batches()))
    mask = task.padding_mask("text_model.encoder.layers.0.self_attn.q_proj", batch)
    assert mask.equal(task.prompts["attention_mask"])
    assert task.padding_mask("vision_model.encoder.layers.0.self_attn.q_proj", batch) is None
    unmasked = classification_task(kind="siglip")
    assert unmasked.padding_mask("text_model.encoder.layers.0.self_attn.q_proj", batch) is None


def test_a_failing_batch_does_not_leave_a_task_frozen():
    task, model = classification_task(kind="siglip"), siglip_model()
    batch = next(iter(task.batches()))
    with torch.no_grad():
        before = task.outputs(model, batch)
        with pytest.raises(RuntimeError, match="stop"), task.frozen(model):
            raise RuntimeError("stop")
        assert task.outputs(model, batch).equal(before)
