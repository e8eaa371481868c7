"""The embedded generative model and its tasks, and the tools that made them."""

import hashlib
from random import Random

import datasets as hf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from keeplora.data.benchmark import read_benchmark
from keeplora.models.pretrained import load_generative, load_processor
from keeplora.models.registry import locate
from mini_vqa import pack, pretrain
from mini_vqa.general import picture
from mini_vqa.model import new_model


@pytest.fixture(scope="module")
def rows():
    return pretrain.Rows(load_processor(locate("mini_vqa")).tokenizer)


def specs():
    benchmark = read_benchmark("mini_vqa")
    return {spec.name: spec for spec in (*benchmark.tasks, *benchmark.probes)}


@pytest.mark.parametrize("name", sorted(specs()))
def test_no_picture_is_in_two_splits_and_every_question_has_a_short_answer(name):
    splits = hf.load_from_disk(str(specs()[name].path))
    seen = {}
    for split, found in splits.items():
        pictures = found.cast_column("image", hf.Image(decode=False))["image"]
        seen[split] = {hashlib.sha256(one["bytes"]).hexdigest() for one in pictures}
        assert all(
            question and len(answer.split()) <= 6
            for question, answer in zip(found["question"], found["answer"], strict=True)
        )
    assert "test" in splits
    names = list(seen)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not seen[first] & seen[second]


def test_pictures_are_drawn_again_as_they_are_shipped():
    shipped = hf.load_from_disk(str(specs()["maps"].path))["validation"]
    drawn = pack.chosen("maps", "validation", 3)
    for one, (made, question) in zip(shipped.select(range(3)), drawn, strict=True):
        assert (one["question"], one["answer"], one["kind"]) == (question.text, question.answer, question.kind)
        # Edges of shapes are smoothed, which another version of the drawing library may do a little otherwise.
        difference = np.asarray(one["image"], dtype=float) - np.asarray(made.image, dtype=float)
        assert np.abs(difference).mean() < 1


@torch.no_grad()
def test_questions_that_share_a_picture_are_answered_as_one_by_one(rows):
    model = load_generative(locate("mini_vqa"))
    made = picture(Random(0), "train")
    asked = made.questions[:4]

    def logits(questions):
        batch = rows.batch([(made.image, questions)])
        labels, _ = batch.pop("labels"), batch.pop("weights")
        found = model(**{name: tensor for name, tensor in batch.items() if tensor is not None}).logits
        return found[:, :-1][labels[:, 1:] != pretrain.IGNORED]

    torch.testing.assert_close(logits(asked), torch.cat([logits([one]) for one in asked]), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_pretraining_that_was_stopped_ends_as_one_that_was_not(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    monkeypatch.setattr(pretrain, "ROWS", 2)
    processor = load_processor(locate("mini_vqa"))
    for name in ("whole", "parts"):
        LlavaForConditionalGeneration.from_pretrained(locate("mini_vqa")).save_pretrained(tmp_path / name / "untrained")
    assert pretrain.pretrain(tmp_path / "whole", processor, steps=3, minutes=60)
    stretches = 0
    while not pretrain.pretrain(tmp_path / "parts", processor, steps=3, minutes=0):
        stretches += 1
    assert stretches == 2
    whole, parts = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=1e-5, atol=1e-7, msg=key)


def test_attention_begins_wired_for_what_stood_behind_the_same_word():
    model = new_model(1279).model.language_model
    model.set_attn_implementation("eager")
    once = torch.randint(10, 1279, (8, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = model(input_ids=torch.cat([once, once], 1), output_attentions=True).attentions
    for head in range(3):
        assert attentions[0][:, head].diagonal(-head - 1, 1, 2).mean() > 0.9  # So many tokens back.
        # From the second time of a word to what stood so many tokens behind it the first time: 1 in 60 by chance.
        assert attentions[1][:, head, 40:].diagonal(head + 1, 1, 2).mean() > 0.2
