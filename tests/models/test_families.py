import json
from dataclasses import replace

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    Siglip2Tokenizer,
    SiglipModel,
    SiglipTokenizer,
)

import tiny
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
    with pytest.raises(ValueError, match=r"model '.*nowhere' is neither an embedded model \(mini, mini_vqa\)"):
        family_of(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="is of type 'resnet'; known types: clip, siglip, and all that"):
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
    prompts = tokenise(tokenizer(), ["a red thing", "a big dark blue thing"], "colors", tiny.clip_config())
    assert prompts["input_ids"].shape == (2, 7)
    assert prompts["attention_mask"].sum(1).tolist() == [5, 7]
    full = tokenise(tokenizer(), ["a red thing", "a big dark blue thing"], "colors", tiny.siglip_config())
    assert full["input_ids"].shape == (2, 12), "a model without a mask was trained at full length"
    assert "attention_mask" not in full


def test_a_prompt_longer_than_the_context_is_an_error():
    with pytest.raises(ValueError, match=r"'colors': the prompt 'a a .*' has 15 tokens, the model's context 12"):
        tokenise(tokenizer(), ["a red thing", "a " * 13], "colors", tiny.clip_config())


@pytest.mark.parametrize("texts", [["a red thing", "a thing", "a red thing"], ["a red xyz", "a red zyx"]])
def test_prompts_that_the_tokenizer_reads_alike_are_named(texts):
    with pytest.raises(ValueError, match=rf"reads '{texts[0]}' and '{texts[-1]}' alike.*with class_names"):
        tokenise(tokenizer(), texts, "colors", tiny.clip_config())


SENTENCES = [
    f"a {kind} of a {size} {color} {noun}."
    for kind in ("photo", "drawing")
    for size in ("big", "dark", "small")
    for color in ("red", "green", "blue")
    for noun in ("thing", "Café", "bird")
]


def siglip_tokenizer(folder):
    """SiglipTokenizer: google/siglip-base-patch16-224 and its siblings."""
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n".join(SENTENCES).lower())
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=-1, bos_id=-1,
        eos_id=1, unk_id=2, control_symbols=["<pad0>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SiglipTokenizer(str(folder / "spiece.model"))


def bpe(special):
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    return json.loads(inner.to_str())["model"]


def gemma_tokenizer(folder):
    """GemmaTokenizer: google/siglip2-base-patch16-224 and its siblings of fixed resolution."""
    trained = bpe(["<pad>", "<eos>", "<bos>", "<unk>"])
    return GemmaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])


def siglip2_tokenizer(folder):
    """Siglip2Tokenizer, which pads on the left if nobody says otherwise."""
    trained = bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return Siglip2Tokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])


def clip_tokenizer(folder):
    """CLIPTokenizer: openai/clip-vit-base-patch32 and its siblings."""
    letters = sorted({letter for text in SENTENCES for letter in text.lower() if letter not in " "})
    vocab = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[])


TOKENIZERS = {
    "clip": {"CLIPTokenizer": clip_tokenizer},
    "siglip": {
        "SiglipTokenizer": siglip_tokenizer,
        "GemmaTokenizer": gemma_tokenizer,
        "Siglip2Tokenizer": siglip2_tokenizer,
    },
}
METADATA = [
    (names, limit)
    for names in (None, ["input_ids"], ["input_ids", "attention_mask"])
    for limit in ("right", "missing", "huge")
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["red thing", "blue thing"], ["red", "big dark blue bird"]], ids=["equal", "different"]
)
@pytest.mark.parametrize(("inputs", "limit"), METADATA)
@pytest.mark.parametrize(("kind", "tokenizer_class"), [(k, name) for k, of in TOKENIZERS.items() for name in of])
def test_features_are_those_of_prompts_padded_as_in_training(tmp_path, kind, tokenizer_class, inputs, limit, names):
    """Whatever a conversion left in the tokenizer's files: what it puts in, its limit, the side that it pads."""
    words = TOKENIZERS[kind][tokenizer_class](tmp_path / "made")
    config = tiny.clip_config() if kind == "clip" else tiny.siglip_config()
    config.text_config.vocab_size = len(words)
    config.text_config.max_position_embeddings = context = 64
    config.text_config.eos_token_id = words.eos_token_id
    torch.manual_seed(0)
    model = (CLIPModel if kind == "clip" else SiglipModel)(config).eval()
    words.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | ({"model_input_names": inputs} if inputs else {})
    settings |= {"padding_side": "left", "model_max_length": {"right": context, "missing": None, "huge": 10**30}[limit]}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = [f"a photo of a {name}." for name in names]
    ours = tokenise(loaded, texts, "colors", config)
    rows = [list(loaded(text, padding=False)["input_ids"]) for text in texts]
    wanted = torch.tensor([row + [loaded.pad_token_id] * (context - len(row)) for row in rows])
    with torch.no_grad():
        features = normalised(model.get_text_features(**ours))
        reference = normalised(model.get_text_features(input_ids=wanted))
    torch.testing.assert_close(features, reference, atol=1e-5, rtol=0)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_cutting_prompts_to_the_longest_changes_no_feature(stored):
    model, name = family_of(stored[0]).load(stored[0]), stored[0]
    words = AutoTokenizer.from_pretrained(name)
    if model.config.model_type == "siglip":
        pytest.skip("reads its answer at the last position, so prompts are not cut")
    texts = ["a photo of a red thing.", "a drawing of a big dark blue thing."]
    short = tokenise(words, texts, "colors", model.config)
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


@pytest.mark.parametrize("classifier", [False, True])
def test_several_templates_are_an_ensemble_of_text_features(stored, classifier):
    name, specs = stored
    templates = ("a drawing of a {}.", "{} photo", "a big {} thing")
    specs = tuple(replace(spec, template=templates) for spec in specs)
    task, model = tasks_of((name, specs))[0], family_of(name).load(name)
    batch = next(iter(task.batches()))
    tokens = tokenise(tokenizer(), specs[0].prompts(sorted(tiny.COLORS)), "", model.config)
    with torch.no_grad():
        single = normalised(model.get_text_features(**tokens))
        images = normalised(model.get_image_features(pixel_values=batch["pixel_values"]))
        text = torch.stack([F.normalize(single[3 * c : 3 * c + 3].mean(0), dim=-1) for c in range(3)])
        logits = model.logit_scale.double().exp() * images @ text.T
        if classifier:
            head = task.start_head(model)
            assert head.weight.shape[0] == 3
            logits += model.logit_scale.double().exp() * images @ F.normalize(head.weight.double(), dim=-1).T
        torch.testing.assert_close(task.outputs(model, batch).double(), logits, atol=1e-3, rtol=1e-4)
        with task.frozen(model):
            torch.testing.assert_close(task.outputs(model, batch).double(), logits, atol=1e-3, rtol=1e-4)
    loss = task.loss(model, batch)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, batch["labels"]), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(layer.weight.grad.any() for layer in tower_ends(model))


def tower_ends(model):
    return [model.vision_model.encoder.layers[-1].self_attn.v_proj, model.text_model.encoder.layers[0].self_attn.v_proj]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (("dog", "small dog"), ("a photo of a {}.", "a photo of a small {}."), ""),
        (("dog", "cat"), ("a photo of a {}.", "a  photo of a {}."), "reads two templates alike, as in 'a photo of a"),
        (("red xyz", "red zyx"), ("a {} thing", "big {}"), "reads 'a red xyz thing' and 'a red zyx thing' alike"),
    ],
)
def test_an_ensemble_is_refused_only_where_classes_or_templates_are_alike(names, templates, message):
    prompts = [template.replace("{}", name) for name in names for template in templates]
    known = tokenizer()
    known.add_tokens(["dog", "cat", "small"])
    if message:
        with pytest.raises(ValueError, match=message):
            tokenise(known, prompts, "t", tiny.clip_config(), len(templates))
    else:
        assert tokenise(known, prompts, "t", tiny.clip_config(), len(templates))["input_ids"].shape[0] == 4
