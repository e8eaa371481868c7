"""The material of pre-training and its losses: images against a table of concepts, later against captions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel

from . import augment, network
from .schedule import Schedule


@dataclass
class Material:
    """What `pack` wrote: drawings, their flags and labels, captions with their concepts, related concepts."""

    images: np.ndarray
    weights: np.ndarray
    ink: Tensor
    flip: Tensor
    labels: Tensor
    ids: Tensor
    owner: np.ndarray
    first: np.ndarray
    count: np.ndarray
    related: Tensor
    negatives: np.ndarray
    log_prior: Tensor


def load(folder: Path) -> Material:
    """Read the packed material; the drawings stay on disk and are shared by the processes."""
    data = np.load(folder / "bank.npz")
    prior = np.full(len(data["first"]), 1e-9)
    for column in range(data["labels"].shape[1]):
        np.add.at(prior, data["labels"][:, column], data["weights"] * (0.7 if column == 0 else 0.1))
    return Material(
        images=np.load(folder / "bank_images.npy", mmap_mode="r"),
        weights=np.cumsum(data["weights"]),
        ink=torch.from_numpy(data["ink"]),
        flip=torch.from_numpy(data["flip"]),
        labels=torch.from_numpy(data["labels"]),
        ids=torch.from_numpy(data["ids"].astype(np.int64)),
        owner=data["owner"],
        first=data["first"],
        count=data["count"],
        related=torch.from_numpy(data["related"]),
        negatives=np.cumsum(data["negatives"]),
        log_prior=torch.from_numpy(np.log(prior)).float(),
    )


def pick(cumulative: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return `n` indices drawn with the weights whose running sum is `cumulative`."""
    return np.minimum(np.searchsorted(cumulative, rng.random(n) * cumulative[-1]), len(cumulative) - 1)


def batch_of(material: Material, schedule: Schedule, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Return drawings, their flags `ink` and `flip`, all their labels, and the label that counts this time."""
    rows = pick(material.weights, schedule.batch, rng)
    labels = material.labels[rows]
    column = np.where(rng.random(len(rows)) < 0.6, 0, rng.integers(0, labels.shape[1], len(rows)))
    drawings = torch.from_numpy(material.images[rows])
    return drawings, material.ink[rows], material.flip[rows], labels, labels[np.arange(len(rows)), column]


def captions_of(material: Material, concepts: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return the padded ids of a random caption of each concept."""
    rows = material.first[concepts] + (rng.random(len(concepts)) * material.count[concepts]).astype(int)
    return material.ids[torch.from_numpy(rows)]


def masked_loss(
    logits: Tensor, labels: Tensor, own: Tensor, concepts: Tensor, target: Tensor, related: Tensor
) -> Tensor:
    """Return the cross-entropy of `target` columns; columns whose concept is related to a row's labels do not count."""
    masked = related[labels[:, :, None], concepts[None, None]].any(1)
    masked[torch.arange(len(own)), target] = False
    return functional.cross_entropy(logits.masked_fill(masked, -1e4), target)


def table_loss(
    model: CLIPModel,
    table: nn.Parameter,
    image: Tensor,
    batch: tuple[Tensor, ...],
    material: Material,
    concepts: np.ndarray,
    text: Tensor,
) -> Tensor:
    """Return the loss of images and of captions against a free vector per concept, over all concepts at once."""
    vectors, scale = functional.normalize(table, dim=-1), model.logit_scale.exp()
    every, chosen = torch.arange(len(table)), torch.from_numpy(concepts)
    seen = masked_loss(
        scale * image @ vectors.T + material.log_prior, batch[3], batch[4], every, batch[4], material.related
    )
    said = masked_loss(20 * text @ vectors.T, chosen[:, None], chosen, every, chosen, material.related)
    return seen + 0.5 * said


def joint_loss(
    model: CLIPModel, image: Tensor, batch: tuple[Tensor, ...], material: Material, negatives: np.ndarray, text: Tensor
) -> Tensor:
    """Return the loss of images against the features of their own captions and of `negatives`."""
    concepts = torch.cat([batch[4], torch.from_numpy(negatives)])
    target = torch.arange(len(image))
    logits = model.logit_scale.exp() * image @ text.T
    return masked_loss(logits, batch[3], batch[4], concepts, target, material.related)


def loss_of(
    model: CLIPModel,
    table: nn.Parameter,
    material: Material,
    schedule: Schedule,
    pool: augment.Pool,
    rng: np.random.Generator,
    generator: torch.Generator,
    *,
    progress: float,
) -> Tensor:
    """Return the loss of a fresh batch: against the table of concepts at first, against captions at the end."""
    joint = progress > schedule.joint
    batch = batch_of(material, schedule, rng)
    concepts = pick(material.negatives, schedule.negatives if joint else schedule.texts, rng)
    spoken = np.concatenate([batch[4].numpy(), concepts]) if joint else concepts
    hardness = max(schedule.easiest, schedule.hardest * min(1.0, progress / schedule.hardest_at))
    images = augment.composites(*batch[:3], pool, generator, hardness=hardness)
    with torch.autocast("cpu", torch.bfloat16):
        image = network.image_features(model, images)
        text = network.text_features(model, captions_of(material, spoken, rng))
    if joint:
        return joint_loss(model, image, batch, material, concepts, text) + 0.0 * table.sum()
    return table_loss(model, table, image, batch, material, concepts, text)
