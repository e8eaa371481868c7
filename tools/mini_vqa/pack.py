"""What is shipped: the model in half the bits, and the tasks as Hugging Face datasets with their images inside."""

import io
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import datasets
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .domains import DOMAINS
from .measure import examination
from .questions import Picture, Question, share_of

PACKAGE = Path(__file__).parents[2] / "src/keeplora/data/mini_vqa"
SIZES = {"train": 600, "validation": 100, "test": 200}
EXAMINED = {"validation": 150, "test": 300}  # Questions of the general mix.
COLUMNS = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "kind": datasets.Value("string"),
    }
)


def split_of(picture: Picture) -> str:
    """Return the split that a content belongs to: no content is in two of them."""
    return {0: "test", 1: "validation"}.get(share_of(picture.key, 8), "train")


def chosen(name: str, split: str, number: int) -> Iterator[tuple[Picture, Question]]:
    """Yield pictures of a task's split, each with one question: kinds and answers come about equally often."""
    rng, kinds, answers = Random(f"{name}/{split}"), Counter[str](), defaultdict[str, Counter[str]](Counter)

    def dues(question: Question) -> tuple[float, float]:
        told = answers[question.kind]
        return kinds[question.kind] + told[question.answer] * max(1, len(told)), rng.random()

    while kinds.total() < number:
        picture = DOMAINS[name](rng)
        if split_of(picture) == split:
            question = min(picture.questions, key=dues)
            kinds[question.kind] += 1
            answers[question.kind][question.answer] += 1
            yield picture, question


def _rows(asked: Iterator[tuple[Picture, Question]]) -> datasets.Dataset:
    table: dict[str, list[object]] = {name: [] for name in COLUMNS}
    for picture, question in asked:
        assert picture.image is not None
        file = io.BytesIO()
        picture.image.save(file, "WEBP", lossless=True, quality=100, method=6)
        table["image"].append({"bytes": file.getvalue(), "path": None})
        table["question"].append(question.text)
        table["answer"].append(question.answer)
        table["kind"].append(question.kind)
    return datasets.Dataset.from_dict(table, features=COLUMNS)


def _examined(split: str, number: int) -> Iterator[tuple[Picture, Question]]:
    for image, question in examination(number, split):
        yield Picture(image), question


def write_tasks(folder: Path = PACKAGE / "data") -> None:
    """Write the five tasks, and the general examination, which is never learned."""
    for name in DOMAINS:
        splits = {split: _rows(chosen(name, split, number)) for split, number in SIZES.items()}
        _save(splits, folder / name)
    splits = {split: _rows(_examined(split, number)) for split, number in EXAMINED.items()}
    _save(splits, folder / "general")


def _save(splits: dict[str, datasets.Dataset], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    datasets.DatasetDict(splits).save_to_disk(folder)
    # A fingerprint is drawn at random, and what is written twice is to be the same.
    for state in folder.rglob("state.json"):
        told = json.loads(state.read_text())
        state.write_text(json.dumps(told | {"_fingerprint": f"mini_vqa-{folder.name}-{state.parent.name}"}, indent=2))


def write_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path = PACKAGE / "model"
) -> None:
    """Write the model in float16, with its processor."""
    model.eval().to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # Tensors are written for their owner alone.
