"""Pack the bank for pre-training: one array of drawings, captions as ids, and which concepts are related."""

import json
from pathlib import Path

import numpy as np

from . import captions, drawings, tokenise


def monochrome(images: np.ndarray) -> np.ndarray:
    """Return `[n] bool`: drawings in black alone."""
    return np.array([int((image[..., :3] * (image[..., 3:] > 40)).max()) < 24 for image in images])


def pack(bank: captions.Bank, sources: list[str], folder: Path, drawn: Path) -> int:
    """Write bank_images.npy, bank.npz, concepts.json and the tokenizer; return the size of the vocabulary."""
    order = list(dict.fromkeys(sources))
    offsets = np.cumsum([0, *[sources.count(name) for name in order]])
    parts = []
    for name, low, high in zip(order, offsets[:-1], offsets[1:], strict=True):
        inside = bank.rows[(bank.rows >= low) & (bank.rows < high)] - low
        parts.append(np.asarray(drawings.load(drawn, name).images)[inside])
    images = np.concatenate(parts)
    np.save(folder / "bank_images.npy", images)
    texts, owner = captions.captions(bank)
    tokenizer = tokenise.train([*texts, *[name for _, name in bank.concepts]])
    tokenise.save(tokenizer, folder)
    groups = np.array([bank.concepts[every[0]][0] for every in bank.labels])
    np.savez(
        folder / "bank.npz", weights=bank.weights, ink=monochrome(images), flip=np.isin(groups, ["thing"]),
        labels=np.array([[*every, *[every[0]] * (4 - len(every))] for every in bank.labels]),
        ids=tokenise.encode(tokenizer, texts), owner=owner, first=np.searchsorted(owner, np.arange(len(bank.concepts))),
        count=np.bincount(owner), related=captions.related(bank), negatives=negative_weights(bank),
    )  # fmt: skip
    (folder / "concepts.json").write_text(json.dumps(bank.concepts))
    return tokenizer.get_vocab_size()


def negative_weights(bank: captions.Bank) -> np.ndarray:
    """Return the chance of each concept to be drawn as an extra negative: half by how often it is shown, half even."""
    shown = np.zeros(len(bank.concepts))
    for weight, every in zip(bank.weights, bank.labels, strict=True):
        shown[every[0]] += weight
    return 0.5 * shown / shown.sum() + 0.5 / len(shown)
