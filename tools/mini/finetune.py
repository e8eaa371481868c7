"""Fine-tune the exported model on one task at a time, to see how much each task leaves to learn."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from . import network
from .export import read_split


def tensors(archive: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Return images `[n, 3, 64, 64]` in [-1, 1], labels and class names of a split."""
    images, labels, label_names = read_split(archive, split)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])
    return pixels / 127.5 - 1, torch.from_numpy(labels), label_names


def accuracy(model: CLIPModel, pixels: Tensor, labels: Tensor, text: Tensor) -> float:
    """Return the share of images whose nearest prompt is their class."""
    with torch.no_grad():
        guess = (network.image_features(model, pixels) @ text.T).argmax(1)
    return float((guess == labels).float().mean())


def fine_tune(folder: Path, archive: Path, template: str, *, split: str, epochs: int = 6, rate: float = 3e-4) -> float:
    """Return the accuracy on `split` after training all vision weights on the task's training split."""
    torch.manual_seed(0)
    model = deepcopy(CLIPModel.from_pretrained(folder))
    pixels, labels, label_names = tensors(archive, "train")
    prompts = AutoTokenizer.from_pretrained(folder)([template.format(name) for name in label_names], padding=True)
    with torch.no_grad():
        text = network.text_features(model, torch.tensor(prompts["input_ids"]))
    parameters = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    steps = epochs * (len(pixels) // 32)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for step in range(steps):
        if step % (len(pixels) // 32) == 0:
            order = torch.randperm(len(pixels))
        rows = order[step % (len(pixels) // 32) * 32 :][:32]
        logits = model.logit_scale.detach().exp() * network.image_features(model, pixels[rows]) @ text.T
        optimiser.zero_grad()
        functional.cross_entropy(logits, labels[rows]).backward()
        optimiser.step()
        scheduler.step()
    return accuracy(model, *tensors(archive, split)[:2], text)
