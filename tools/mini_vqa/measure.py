"""What the model knows: the general examination, with the right image and with another one."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .general import picture
from .pretrain import IGNORED, Rows
from .questions import LETTERS, Question

Asked = tuple[Image.Image | None, Question]
NOT_EXAMINED = ("list",)  # One wrong shape of six makes it wrong: what it teaches is examined by the other kinds.


def examination(number: int, seed: str) -> list[Asked]:
    """Return so many questions of the held-out part of the general mix, one or two of a picture."""
    rng, asked = Random(f"examination/{seed}"), []
    while len(asked) < number:
        made = picture(rng, "test")
        questions = [question for question in made.questions if question.kind not in NOT_EXAMINED]
        asked += [(made.image, question) for question in rng.sample(questions, min(2, len(questions)))]
    return asked[:number]


@torch.no_grad()
def right(model: LlavaForConditionalGeneration, rows: Rows, asked: Sequence[Asked]) -> list[bool]:
    """Return which answers are right word for word: greedy decoding gives them if each token is the likeliest."""
    model.eval()
    found: list[bool] = []
    for start in range(0, len(asked), 100):
        batch = rows.batch([(image, [question]) for image, question in asked[start : start + 100]])
        labels, _ = batch.pop("labels"), batch.pop("weights")
        assert labels is not None
        logits = model(**{name: tensor for name, tensor in batch.items() if tensor is not None}).logits[:, :-1]
        told = labels[:, 1:]
        found += ((logits.argmax(-1) == told) | (told == IGNORED)).all(1).tolist()
    return found


def with_another_image(asked: Sequence[Asked]) -> list[Asked]:
    """Return the questions, each with the image of another one."""
    images = [image for image, _ in asked]
    turned = images[7:] + images[:7]
    return [(image, question) for image, (_, question) in zip(turned, asked, strict=True)]


def group_of(question: Question) -> str:
    """Return the group of an answer: option letters, yes or no, numbers, other words."""
    if question.answer in ("yes", "no"):
        return "yes/no"
    if question.answer in LETTERS and "a. " in question.text:
        return "letter"
    return "number" if question.answer.isdigit() else "word"


def report(model: LlavaForConditionalGeneration, processor: LlavaProcessor, number: int) -> dict[str, object]:
    """Return the figures of the general examination."""
    rows, asked = Rows(processor.tokenizer), examination(number, "0")
    own, other = right(model, rows, asked), right(model, rows, with_another_image(asked))
    groups: dict[str, list[int]] = defaultdict(list)
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, (_, question) in enumerate(asked):
        groups[group_of(question)].append(index)
        kinds[question.kind].append(index)
    table = {name: [_share(own, of), _share(other, of), len(of)] for name, of in sorted(groups.items())}
    per_kind = {name: [_share(own, of), _share(other, of), len(of)] for name, of in sorted(kinds.items())}
    whole = {"general": _share(own), "another image": _share(other), "commonest answers": round(commonest(asked), 1)}
    return {**whole, "groups": table, "kinds": per_kind}


def commonest(asked: Sequence[Asked]) -> float:
    """Return the score of the most frequent answer of each kind of question, in percent."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked:
        answers[question.kind][question.answer] += 1
    return 100 * sum(max(counter.values()) for counter in answers.values()) / len(asked)


def _share(found: Sequence[bool], of: Sequence[int] | None = None) -> float:
    chosen = found if of is None else [found[index] for index in of]
    return round(100 * sum(chosen) / len(chosen), 1)
