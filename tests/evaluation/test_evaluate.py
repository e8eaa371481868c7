"""Evaluation, and the dual encoders it runs on, against the plain transformers pipeline."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import tiny
from keeplora.data.benchmark import TaskSpec, read_benchmark
from keeplora.data.readers import read_splits
from keeplora.errors import LearningError
from keeplora.evaluation.evaluate import evaluate
from keeplora.models.dual_encoder import DualEncoder
from keeplora.models.interfaces import StreamTask
from keeplora.models.registry import family_of
from keeplora.progress import silent

TEMPLATES = ("a drawing of a {}.", "a photo of a big dark {} thing.")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    tiny.write_benchmark(folder, tasks=2, per_class=5)
    for kind in ("clip", "siglip"):
        tiny.save_dual_encoder(folder / kind, kind)
    return folder


def tasks_of(place, kind, *, batch_size=4, seed=0):
    specs = read_benchmark(str(place / "colors.toml")).tasks
    name = str(place / kind)
    return DualEncoder().tasks(name, specs, batch_size=batch_size, evaluation="test", seed=seed, track=silent)


def examples_of(place, index=0, split=1):
    return read_splits(read_benchmark(str(place / "colors.toml")).tasks[index], "test")[split]


def plain_logits(place, kind, index, padding, split=1):
    """Every step as the model's card would have it: full image processor, prompts, one forward pass."""
    name = str(place / kind)
    model = AutoModel.from_pretrained(name).eval()
    examples = examples_of(place, index, split)
    images = [examples.image(i) for i in range(len(examples))]
    pixels = AutoImageProcessor.from_pretrained(name, backend="pil")(images, return_tensors="pt")
    prompts = [TEMPLATES[index].replace("{}", label) for label in examples.class_names]
    text = AutoTokenizer.from_pretrained(name)(prompts, padding=padding, return_tensors="pt")
    text = {key: text[key] for key in ("input_ids", "attention_mask") if key in text}
    with torch.no_grad():
        return model(**pixels, **text).logits_per_image, torch.tensor(examples.labels)


PADDINGS = [("clip", "longest"), ("clip", "max_length"), ("siglip", "max_length")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "padding"), PADDINGS)
@pytest.mark.parametrize("index", [0, 1])
def test_logits_loss_and_score_are_those_of_the_plain_pipeline(place, kind, padding, index):
    logits, labels = plain_logits(place, kind, index, padding)
    task = tasks_of(place, kind, batch_size=100)[index]
    model = DualEncoder().load(str(place / kind))
    (batch,) = task.test_batches()
    with torch.no_grad():
        torch.testing.assert_close(task.outputs(model, batch), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(task.loss(model, batch), F.cross_entropy(logits, labels), rtol=1e-4, atol=1e-4)
        with task.frozen(model):
            torch.testing.assert_close(task.outputs(model, batch), logits, rtol=1e-4, atol=1e-4)
    hits = (logits.argmax(1) == labels).sum().item()
    assert evaluate(model, [task]) == [pytest.approx(100 * hits / len(labels))]


def test_prompts_of_clip_are_only_as_long_as_the_longest(place):
    short, long = (task.prompts["input_ids"].shape for task in tasks_of(place, "clip"))
    assert short == (3, 8)
    assert long == (3, 11)


def test_prompts_of_a_model_without_mask_fill_the_context_and_every_row_is_real(place):
    task = tasks_of(place, "siglip")[0]
    assert task.prompts.keys() == {"input_ids"}
    assert task.prompts["input_ids"].shape == (3, 12)
    assert task.padding_mask("text_model.encoder.layers.0.self_attn.q_proj", {}) is None


def test_padding_is_told_for_the_text_tower_only(place):
    task = tasks_of(place, "clip")[0]
    assert torch.equal(task.padding_mask("text_model.x", {}), task.prompts["attention_mask"])
    assert task.padding_mask("vision_model.x", {}) is None


def test_scores_do_not_depend_on_the_batch_size(place):
    model = DualEncoder().load(str(place / "clip"))
    assert evaluate(model, tasks_of(place, "clip", batch_size=1)) == evaluate(
        model, tasks_of(place, "clip", batch_size=7)
    )


def test_text_features_are_computed_once_for_each_evaluation_of_a_task(place, monkeypatch):
    model = DualEncoder().load(str(place / "clip"))
    calls = []
    monkeypatch.setattr(
        model, "get_text_features", lambda **prompts: calls.append(1) or type(model).get_text_features(model, **prompts)
    )
    tasks = tasks_of(place, "clip", batch_size=2)
    evaluate(model, tasks)
    assert len(calls) == 2
    evaluate(model, tasks)
    assert len(calls) == 4


def test_changed_weights_change_the_next_evaluations_text_features(place):
    model = DualEncoder().load(str(place / "clip"))
    task = tasks_of(place, "clip", batch_size=100)[0]
    (batch,) = task.test_batches()
    with torch.no_grad():
        with task.frozen(model):
            before = task.outputs(model, batch)
        model.text_projection.weight.mul_(torch.linspace(-1, 1, 12))
        with task.frozen(model):
            after = task.outputs(model, batch)
        torch.testing.assert_close(after, task.outputs(model, batch), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_evaluation_gives_modes_and_gradients_back(place):
    model = DualEncoder().load(str(place / "clip"))
    model.vision_model.train()
    before = [module.training for module in model.modules()]
    evaluate(model, tasks_of(place, "clip"))
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_progress_names_the_task_and_counts_its_batches(place):
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        return items

    evaluate(DualEncoder().load(str(place / "clip")), tasks_of(place, "clip", batch_size=4), track=track)
    assert seen == [("task0: evaluating", 4), ("task1: evaluating", 4)]


def test_a_prompt_longer_than_the_context_is_an_error_with_both_lengths(place):
    spec = TaskSpec(name="long", path=place / "data0", template="a {} " + "big " * 12)
    with pytest.raises(ValueError, match=r"'long': the prompt '.*' has 16 tokens, the model's context 12; shorten"):
        DualEncoder().tasks(str(place / "clip"), (spec,), batch_size=2, evaluation="test", seed=0, track=silent)


@pytest.mark.parametrize("template", ["{} {name}", "{} of {0}", "{} {"])
def test_other_braces_of_a_template_are_text(place, template):
    spec = TaskSpec(name="braces", path=place / "data0", template=template)
    (task,) = DualEncoder().tasks(str(place / "clip"), (spec,), batch_size=2, evaluation="test", seed=0, track=silent)
    assert len(task.prompts["input_ids"]) == 3


def order_of(task):
    return [batch["labels"].tolist() for _ in range(2) for batch in task.batches()]


def test_the_order_of_the_training_batches_follows_from_the_seed(place):
    first, same, other = (order_of(tasks_of(place, "clip", seed=seed)[0]) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    half = len(first) // 2
    assert first[:half] != first[half:]


def test_the_held_out_order_is_fixed(place):
    task = tasks_of(place, "clip")[0]
    labels = torch.cat([batch["labels"] for batch in task.test_batches()])
    assert labels.tolist() == list(examples_of(place).labels)


def test_a_model_of_another_family_lists_the_known_types(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match="is of type 'resnet'; known types: clip, siglip"):
        family_of(str(tmp_path))


def test_a_model_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent' is neither an embedded model"):
        family_of(str(tmp_path / "absent"))


def test_a_saved_model_gives_the_same_answers(place, tmp_path):
    family = DualEncoder()
    model = family.load(str(place / "clip"))
    with torch.no_grad():
        model.vision_model.encoder.layers[0].self_attn.q_proj.weight.add_(0.1)
    family.save(model, str(place / "clip"), tmp_path / "saved")
    again = family.load(str(tmp_path / "saved"))
    task = tasks_of(place, "clip", batch_size=100)[0]
    (batch,) = task.test_batches()
    with torch.no_grad():
        assert np.array_equal(task.outputs(model, batch), task.outputs(again, batch))
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".txt", ".jinja"}


def poisoned(model, kind):
    """Spoil a model so that its outputs are not finite, as a broken file or too small a range would."""
    weights = dict(model.named_parameters())
    name = next(name for name in weights if "vision" in name and name.endswith("v_proj.weight"))
    with torch.no_grad():
        if kind == "overflow":
            weights[name].mul_(1e38)
        else:
            weights[name][0, 0] = float(kind)
    return model


@pytest.mark.parametrize("kind", ["nan", "inf", "overflow"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_outputs_that_are_not_finite_get_no_score(place, family, kind):
    model = poisoned(DualEncoder().load(str(place / family)), kind)
    with pytest.raises(LearningError, match=r"task 'task0', test batch 1: the model's outputs hold NaN or infinity"):
        evaluate(model, tasks_of(place, family))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_get_no_score_whatever_the_task(value):
    class Numbers(tiny.VectorTask, StreamTask):
        def test_batches(self):
            return self.data

        num_seen = 0

        def predict(self, model, batch):
            self.num_seen += 1
            return torch.full((len(batch[1]),), value if self.num_seen == 3 else 1.0)

        def references(self, batch):
            return batch[1]

    with pytest.raises(LearningError, match=r"task 'vectors', test batch 3: the answers are not finite"):
        evaluate(tiny.MLP(), [Numbers()])
