"""Generative models: the loss, its padding, and answers, against ones made record by record."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets as hf
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

import chatty
from keeplora.cli import main as cli
from keeplora.data.benchmark import read_benchmark
from keeplora.errors import LearningError
from keeplora.evaluation.evaluate import evaluate
from keeplora.layers.gradients import mean_gradients
from keeplora.layers.input_covariance import input_grams
from keeplora.layers.lora import linear_targets
from keeplora.layers.names import tower_of
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.models.chat import ChatFormat
from keeplora.models.generative import ConversationTask, Generative
from keeplora.models.pretrained import load_processor
from keeplora.models.registry import family_of
from keeplora.progress import silent
from tiny import autograd_gradients

FAST = ("llava", "llama")  # One with images and one without; the others take seconds.
KINDS = [
    kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow)
    for kind in (*chatty.IMAGE_MODELS, *chatty.TEXT_MODELS)
]


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """The folder of a model, and a stream for it."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    has_images = kind in chatty.IMAGE_MODELS
    save = chatty.save_image_model if has_images else chatty.save_text_model
    seed = 2 if kind == "gemma3" else 0  # With most others it says nothing.
    return str(save(folder / "model", kind, seed)), chatty.write_stream(folder, with_images=has_images)


def tasks_of(stored, batch_size=3):
    model, stream = stored
    specs = read_benchmark(str(stream)).tasks
    return family_of(model).tasks(model, specs, batch_size=batch_size, evaluation="test", seed=0, track=silent)


def load(stored):
    return family_of(stored[0]).load(stored[0])


def test_the_family_is_found_for_models_that_answer(stored):
    assert isinstance(family_of(stored[0]), Generative)


def test_the_loss_is_the_mean_over_all_answer_tokens_without_padding(stored):
    model, tasks = load(stored), [tasks_of(stored, size)[0] for size in (8, 1)]
    (batch,) = tasks[0].batches()
    singles = list(tasks[1].batches())
    sums, total = 0.0, 0.0
    for one in singles:
        ids, labels = one["inputs"]["input_ids"], one["labels"]
        logits = model(**one["inputs"]).logits.double()
        picked = F.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        sums -= picked[labels[0, 1:] != -100].sum()
        total += int((labels != -100).sum())
    assert sum(tasks[1].weight(one) for one in singles) == tasks[0].weight(batch) == total
    torch.testing.assert_close(tasks[0].loss(model, batch).double(), sums / total, atol=1e-5, rtol=1e-5)


def test_gradients_and_second_moments_know_no_padding_and_no_batch_size(stored):
    model = load(stored).double()  # Sums in float32 differ by more than the bound below where rows lie otherwise.
    names = linear_targets(model, ("auto",))
    assert len(names) == 2 * (4 if any("qkv" in name for name in names) else 7)
    assert all(tower_of(name) == "language" for name in names)
    small, large = (tasks_of(stored, size)[0] for size in (1, 4))
    found = [mean_gradients(model, task, names) for task in (small, large)]
    reference = autograd_gradients(model, tasks_of(stored, 2)[0], names)
    moments = [input_grams(model, task, names) for task in (small, large)]
    for name in names:
        for one in found:
            torch.testing.assert_close(one[name], reference[name].float(), atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(moments[0][name], moments[1][name], atol=1e-4, rtol=1e-3)


def test_answers_know_no_padding_and_no_batch_size(stored):
    model = load(stored)
    answers = []
    for size in (1, 3, 8):
        task = tasks_of(stored, size)[0]
        with torch.no_grad():
            answers.append([text for batch in task.test_batches() for text in task.predict(model, batch)])
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1, "the model says different things"


@pytest.mark.slow
def test_a_task_is_learned_and_its_certificate_is_clean(stored):
    model, task = load(stored), tasks_of(stored, 4)[0]
    method = KeepLoRA(KeepLoRAConfig(rank=3, weight_energy=0.3, feature_energy=0.8))
    before = torch.stack([task.loss(model, batch).detach() for batch in task.batches()]).mean()
    adapted = method.before_task(model, task)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        for batch in task.batches():
            optimizer.zero_grad()
            task.loss(adapted, batch).backward()
            optimizer.step()
    model = method.after_task(adapted, task)
    after = torch.stack([task.loss(model, batch).detach() for batch in task.batches()]).mean()
    assert after < 0.7 * before
    assert max(layer.leak for layer in method.record.certificate.values()) < 1e-5


@pytest.mark.slow
def test_a_run_ends_and_its_export_answers_as_the_evaluator(stored, tmp_path, capsys):
    model, stream = stored
    flags = ["--benchmark", str(stream), "--model", model, "--rank", "4", "--batch-size", "4", "--epochs", "8",
             "--learning-rate", "0.02", "--weight-energy", "0.3", "--method", "keeplora"]  # fmt: skip
    cli.main(["run", *flags, "--output", str(tmp_path / "run")])
    cli.main(["certify", str(tmp_path / "run")])
    cli.main(["export", str(tmp_path / "run"), "--format", "merged", "--output", str(tmp_path / "out")])
    assert "no breach was found" in capsys.readouterr().out
    exported = Generative().load(str(tmp_path / "out"))
    task = tasks_of(stored, 3)[1]
    recorded = json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"][-1][1]
    assert evaluate(exported, [task]) == [pytest.approx(recorded)]
    with torch.no_grad():
        expected = [text for batch in task.test_batches() for text in task.predict(exported, batch)]
    answers = []
    has_images = task.chat.reads_images
    kind = "image-text-to-text" if has_images else "text-generation"
    ends = [task.chat.tokenizer.convert_tokens_to_ids(token) for token in task.chat.end_tokens]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": ends}
    reads_videos = has_images and "video_processor" in task.chat.processor.get_attributes()
    # One that is also for videos needs torchvision, unless it is ours.
    own = {"processor": load_processor(str(tmp_path / "out"))} if reads_videos else {"backend": "pil"}
    asked = pipeline(kind, model=str(tmp_path / "out"), **(own if has_images else {}))
    for index, record in enumerate(task.test.records):
        images = iter(task.test.images(index))
        messages = [
            {**one, "content": [{**p, "image": next(images)} if p["type"] == "image" else p for p in one["content"]]}
            for one in record.messages[:-1]
        ]
        if has_images:
            found = asked(text=messages, return_full_text=False, generate_kwargs=options)
        else:
            plain = [{**one, "content": "".join(p["text"] for p in one["content"])} for one in messages]
            found = asked(plain, return_full_text=False, **options)
        answers.append(found[0]["generated_text"].strip())
    assert answers == expected


def test_outputs_that_are_not_finite_get_no_score(stored):
    model, task = load(stored), tasks_of(stored)[0]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("down_proj.weight")).fill_(float("nan"))
    with pytest.raises(LearningError, match="task 'task0', test batch 1: the model's outputs hold NaN or infinity"):
        evaluate(model, [task])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('chat_template = "nope"', "task 'task0': unknown chat template 'nope'"),
        (
            "max_length = 9",
            r"8 records of train have more than 9 tokens: train0 \(",
        ),
        ('metric = "nope"', "unknown metric 'nope'"),
    ],
)
def test_wrong_settings_of_a_task_are_named(stored, tmp_path, change, message, capsys):
    (tmp_path / "chat.toml").write_text(stored[1].read_text().replace('path = "', f'path = "{stored[1].parent}/')
                                        .replace("max_new_tokens = 4", f"max_new_tokens = 4\n{change}"))  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["run", "--benchmark", str(tmp_path / "chat.toml"), "--model", stored[0], "--output", str(tmp_path / "run")]
        )
    assert end.value.code == 1
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(message, text), text


def test_a_processor_that_moves_the_text_is_refused(tmp_path, monkeypatch):
    stored = str(chatty.save_llava(tmp_path / "model")), chatty.write_stream(tmp_path)
    original = ChatFormat.batch

    def moved(self, texts, images, *, left=False):
        found = original(self, texts, images, left=left)
        return found | {"offsets": found["offsets"] + 3}

    monkeypatch.setattr(ChatFormat, "batch", moved)
    with pytest.raises(
        ValueError, match=r"task 'task0': the model's processor changes the text: .* were to be learned of"
    ):
        tasks_of(stored)


@pytest.mark.slow
def test_the_loss_may_be_a_mean_over_examples(stored):
    model = load(stored)
    (whole,), singles = (list(made(stored, size).batches()) for size in (8, 1))
    task = made(stored, 8)
    expected = torch.stack([tasks_of(stored, 1)[0].loss(model, one) for one in singles]).mean()
    torch.testing.assert_close(task.loss(model, whole), expected, atol=1e-5, rtol=1e-5)
    assert task.weight(whole) == len(singles) == 8


def made(stored, batch_size, **settings):
    """Return the first task of the stream, with other settings."""
    spec = replace(read_benchmark(str(stored[1])).tasks[0], **{"loss_over": "examples", **settings})
    family = family_of(stored[0])
    return family.tasks(stored[0], (spec,), batch_size=batch_size, evaluation="test", seed=0, track=silent)[0]


def test_features_may_be_those_of_answers_or_of_text(stored):
    model, layer = load(stored), linear_targets(load(stored), ("auto",))[0]
    rows = {}
    for kind in ("all", "text", "answers"):
        task = made(stored, 4, features_of=kind)
        rows[kind] = sum(int(task.padding_mask(layer, batch).sum()) for batch in task.batches())
        input_grams(model, task, [layer])
    (batch,) = made(stored, 8).batches()
    assert rows["answers"] == int((batch["labels"] != -100).sum())
    assert rows["all"] == int(batch["inputs"]["attention_mask"].sum())
    has_images = "pixel_values" in batch["inputs"]
    assert (rows["answers"] < rows["text"] < rows["all"]) if has_images else (rows["text"] == rows["all"])


GUIDE = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "docs/generative.md").read_text(), re.M | re.S
)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # trl's own
@pytest.mark.slow
@pytest.mark.parametrize("example", GUIDE)
def test_the_examples_of_the_guide_run(tmp_path, monkeypatch, capsys, example):
    monkeypatch.chdir(tmp_path)
    chatty.save_text_model(tmp_path / "MODEL")
    exec(compile(example, "docs/generative.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_a_task_is_made_of_rows_a_file_or_a_dataset(tmp_path):
    chatty.write_llava(tmp_path)
    processor = load_processor(str(chatty.save_llava(tmp_path / "model")))
    rows = json.loads((tmp_path / "train.json").read_text())
    images = [Image.open(tmp_path / row["image"]).convert("RGB") for row in rows]
    talks = [
        {"messages": [{"role": "user", "content": "<image>What colour is it?"},
                      {"role": "assistant", "content": row["conversations"][1]["value"]}], "image": image}
        for row, image in zip(rows, images, strict=True)
    ]  # fmt: skip
    dataset = hf.Dataset.from_list(talks)
    sources = [(rows, str(tmp_path)), (tmp_path / "train.json", str(tmp_path)), (talks, ""), (dataset, "")]
    found = []
    for source, root in sources:
        task = ConversationTask(source, processor, batch_size=8, image_root=root)
        (batch,) = task.batches()
        found.append((batch["inputs"]["pixel_values"], batch["labels"]))
    for pixels, labels in found[1:]:
        torch.testing.assert_close(pixels, found[0][0])
        assert labels.equal(found[0][1])
    with pytest.raises(ValueError, match="task 'x': 1 record of train has no answer at the end: 0"):
        ConversationTask([{"messages": talks[0]["messages"][:1], "image": images[0]}], processor, name="x")
    with pytest.raises(ValueError, match="unknown key 'nope'"):
        ConversationTask(talks, processor, nope=1)
