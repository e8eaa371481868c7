"""Write a checkpoint as a Hugging Face folder, and measure its zero-shot accuracy on the task archives."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from . import network

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"height": 64, "width": 64}, "resample": 3, "do_center_crop": False, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def export(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write config, weights (float32 safetensors), tokenizer and image processor."""
    state = load_file(checkpoint)
    vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
    model = CLIPModel(network.config(vocabulary))
    model.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


def read_split(archive: Path, split: str) -> tuple[list[Image.Image], np.ndarray, list[str]]:
    """Return images, labels and sorted class names of a split of an archive."""
    with zipfile.ZipFile(archive) as opened:
        entries = [name for name in opened.namelist() if name.startswith(f"{split}/")]
        images = [Image.open(io.BytesIO(opened.read(name))).convert("RGB") for name in entries]
    every = [name.split("/")[1] for name in entries]
    label_names = sorted(set(every))
    return images, np.array([label_names.index(name) for name in every]), label_names


@torch.no_grad()
def zero_shot(folder: Path, archives: Path, split: str, templates: dict[str, str]) -> dict[str, tuple[float, int]]:
    """Return task -> (accuracy, number of classes) of an exported model on a split."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    result = {}
    for task, template in templates.items():
        images, labels, label_names = read_split(archives / f"{task}.zip", split)
        prompts = tokenizer([template.format(name) for name in label_names], padding=True, return_tensors="pt")
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=pixels, input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"])
        guess = logits.logits_per_image.argmax(1).numpy()
        result[task] = float((guess == labels).mean()), len(label_names)
    return result


def table(measured: dict[str, tuple[float, int]]) -> str:
    """Return a Markdown table of accuracy, chance and their ratio."""
    rows = [f"| {task} | {n} | {1 / n:.3f} | {acc:.3f} | {acc * n:.1f} |" for task, (acc, n) in measured.items()]
    mean = float(np.mean([acc for acc, _ in measured.values()]))
    head = ["| task | classes | chance | zero-shot | times chance |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join([*head, *rows, f"| mean | | | {mean:.3f} | |"])
