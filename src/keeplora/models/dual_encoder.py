"""Dual encoders of Hugging Face (CLIP, SigLIP): images are classified by the text features of their class prompts."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from keeplora.data.benchmark import TaskSpec
from keeplora.data.cache import Pixels, PixelStore
from keeplora.data.readers import read_splits
from keeplora.layers.module_state import device_of, evaluation_mode
from keeplora.layers.statistics import require_finite
from keeplora.models.clip_last_layer import only_the_pooled_row
from keeplora.models.interfaces import Family, StreamTask
from keeplora.models.pretrained import (
    WHOLE,
    Precision,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    naming,
)
from keeplora.progress import Track
from keeplora.task import Batch, DeferredGradient, to_device

PIXELS_AT_ONCE = 1_250_000
"""Values of the images that a CPU reads at once: 8 of 224 x 224. What the layers make of more fits its caches less."""

READS_PADDING = ("siglip",)  # Model types that were trained on prompts of full length, and read the last position.


class CosineHead(nn.Module):
    """Cosine classifier on image features: one direction for each class, `weight [num_classes, d]` (KeepLoRA+)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return the cosine of every image feature `[n, d]` with every class, `[n, num_classes]`."""
        return F.normalize(features, dim=-1) @ F.normalize(self.weight, dim=-1).T


class ClassificationTask(StreamTask):
    """Images to be classified by the text features of their class prompts, and by the task's own head if it has one.

    Each class has as many of the `prompts` as there are templates, one class's after the other's.
    """

    def __init__(
        self,
        name: str,
        train: Pixels,
        test: Pixels,
        prompts: dict[str, Tensor],
        *,
        batch_size: int,
        seed: int,
        num_templates: int = 1,
    ) -> None:
        self.name = name
        self.prompts = prompts
        self.num_templates = num_templates
        self.head: CosineHead | None = None
        self._order = torch.Generator().manual_seed(seed)
        self.train = train
        self._train = DataLoader(train, batch_size, shuffle=True, generator=self._order, collate_fn=train.collate)
        self._test = DataLoader(test, batch_size, collate_fn=test.collate)
        self._text_features: Tensor | None = None
        self._deferred: list[DeferredGradient] = []
        self._is_frozen = False

    def batches(self) -> Iterable[Batch]:
        return self._train

    def test_batches(self) -> Iterable[Batch]:
        return self._test

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over the task's classes."""
        return F.cross_entropy(self.outputs(model, batch).float(), batch["labels"])

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, `[n, num_classes]`."""
        if not self._is_frozen and self.head is None:
            # The model's own forward pass, which is what wraps around it (DDP, autocast) expect to be called.
            prompts = to_device(self.prompts, batch["labels"].device)
            with only_the_pooled_row(model):
                found = model(pixel_values=batch["pixel_values"], **prompts)
            if self.num_templates == 1:
                return cast(Tensor, found.logits_per_image)
            images, text = found.image_embeds, self._of_classes(found.text_embeds)
        else:
            images, text = _image_features(model, batch), self._text_of(model)
        scale = cast(Tensor, getattr(model, "module", model).logit_scale).exp()  # DDP has the model inside.
        logits = scale * F.normalize(images, dim=-1) @ text.T
        return logits if self.head is None else logits + scale * self.head.to(images.device)(images)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.outputs(model, batch)
        require_finite(logits, "the model's outputs hold NaN or infinity; are its weights whole, and in float32?")
        return logits.argmax(dim=-1)

    def references(self, batch: Batch) -> Tensor:
        return cast(Tensor, batch["labels"])

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Leave the padding of the prompts out of the text tower's statistics."""
        return self.prompts.get("attention_mask") if layer.startswith("text_model.") else None

    def start_head(self, model: nn.Module) -> nn.Module:
        """Start the task's cosine classifier from the class means of its normalised training features."""
        num_classes, sums = len(self.prompts["input_ids"]) // self.num_templates, None
        with torch.no_grad(), evaluation_mode(model):
            for batch in self.batches():
                for part in self.micro_batches(to_device(batch, device_of(model))):
                    features = F.normalize(_image_features(model, part).float(), dim=-1)
                    sums = features.new_zeros(num_classes, features.shape[1]) if sums is None else sums
                    sums.index_add_(0, part["labels"], features)
        assert sums is not None
        return self.load_head({"weight": F.normalize(sums, dim=-1)})

    def load_head(self, weights: dict[str, Tensor]) -> nn.Module:
        self.head = CosineHead(weights["weight"])
        return self.head

    def generators(self) -> tuple[torch.Generator, ...]:
        return (self._order,)

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        """Cut a batch of images on a CPU, so that what the layers make of it is small enough to use memory again."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        n = max(1, PIXELS_AT_ONCE // pixels[0].numel()) if pixels.device.type == "cpu" else len(pixels)
        cut = zip(pixels.split(n), labels.split(n), strict=True)
        return [{"pixel_values": images, "labels": classes} for images, classes in cut]

    def sample(self, batch: Batch) -> Batch:
        """Return the first two images."""
        return {"pixel_values": batch["pixel_values"][:2], "labels": batch["labels"][:2]}

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[list[DeferredGradient]]:
        """Encode the prompts once for all batches inside."""
        self._is_frozen, self._text_features, self._deferred = True, None, []
        try:
            yield self._deferred
        finally:
            self._is_frozen, self._text_features, self._deferred = False, None, []

    def _text_of(self, model: nn.Module) -> Tensor:
        if self._text_features is not None:
            return self._text_features
        prompts = to_device(self.prompts, device_of(model))
        features = self._of_classes(_pooled(cast(Any, model).get_text_features(**prompts)))
        if self._is_frozen and features.requires_grad:
            self._deferred.append(DeferredGradient(features))
            features = self._deferred[-1].leaf
        self._text_features = features if self._is_frozen else None
        return features

    def _of_classes(self, features: Tensor) -> Tensor:
        """Return the normalised features `[num_classes, d]` of classes: means over those of their prompts."""
        features = F.normalize(features, dim=-1)
        if self.num_templates == 1:
            return features
        return F.normalize(features.unflatten(0, (-1, self.num_templates)).mean(1), dim=-1)


class DualEncoder(Family):
    """Loads a dual encoder and makes classification tasks for it."""

    def load(self, name: str, precision: Precision = WHOLE) -> nn.Module:
        return load_model(name, precision=precision)

    def tasks(
        self, name: str, specs: tuple[TaskSpec, ...], *, batch_size: int, evaluation: str, seed: int, track: Track
    ) -> list[StreamTask]:
        config, tokenizer, store = load_config(name), load_tokenizer(name), PixelStore(load_image_processor(name))
        tasks: list[StreamTask] = []
        for index, spec in enumerate(specs):
            splits = dict(zip(("train", evaluation), read_splits(spec, evaluation), strict=True))
            prompts = tokenise(
                tokenizer, spec.prompts(splits["train"].class_names), spec.name, config, len(spec.templates)
            )
            train, test = (
                store.read(examples, track, f"{spec.name}: reading {split}") for split, examples in splits.items()
            )
            if set(sizes := train.pixels.shape[2:]) != {side := config.vision_config.image_size}:
                made = " x ".join(map(str, sizes))
                raise ValueError(
                    f"model {name!r} reads images of {side} x {side}, and its image processor makes {made}; get its"
                    " preprocessor_config.json anew"
                )
            task = ClassificationTask(
                spec.name, train, test, prompts, batch_size=batch_size, seed=seed + index,
                num_templates=len(spec.templates),
            )  # fmt: skip
            task.epochs, task.metric = spec.epochs, spec.metric or ClassificationTask.metric
            task.data = {
                "classes": list(splits["train"].class_names),
                "images": [len(examples) for examples in splits.values()],
                "digest": hashlib.sha256(repr([examples.labels for examples in splits.values()]).encode()).hexdigest(),
            }
            tasks.append(task)
        return tasks

    def save(self, model: nn.Module, name: str, folder: Path) -> None:
        cast(Any, model).save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        load_image_processor(name).save_pretrained(folder)


def tokenise(tokenizer: Any, texts: list[str], task: str, config: Any, num_templates: int = 1) -> dict[str, Tensor]:
    """Turn prompts into `input_ids` and `attention_mask`, padded as the model with this configuration was trained.

    Each class has as many of them as there are templates, one class's after the other's. What the tokenizer's own files
    say of padding, masks and length is not asked: conversions leave it out or change it.
    """
    prompts = token_ids(tokenizer, texts)
    context = config.text_config.max_position_embeddings
    full = context_of(config)
    longest = max(prompts, key=len)
    if len(longest) > context:
        flaw = f"the prompt {texts[prompts.index(longest)]!r} has {len(longest)} tokens, the model's context {context}"
        raise ValueError(f"task {task!r}: {flaw}; shorten the template or the class names")
    classes = [tuple(map(tuple, prompts[i : i + num_templates])) for i in range(0, len(prompts), num_templates)]
    if same := [(i, j) for j, ids in enumerate(classes) if (i := classes.index(ids)) < j]:
        (i, j), more = same[0], f" (and {len(same) - 1} more pairs)" if len(same) > 1 else ""
        one, other = texts[i * num_templates], texts[j * num_templates]
        raise ValueError(
            f"task {task!r}: the tokenizer reads {one!r} and {other!r} alike{more}, perhaps because it ignores"
            " case; give one of them another name with class_names"
        )
    if twice := next((own for own in classes if len(set(own)) < num_templates), None):
        text = texts[classes.index(twice) * num_templates]
        raise ValueError(f"task {task!r}: the tokenizer reads two templates alike, as in {text!r}; leave one out")
    if (pad := tokenizer.pad_token_id) is None:
        raise ValueError(f"task {task!r}: the model's tokenizer has no pad token; get its files anew")
    width = full or len(longest)
    ids = torch.tensor([prompt + [pad] * (width - len(prompt)) for prompt in prompts])
    if full:
        return {"input_ids": ids}
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long()}


def context_of(config: Any) -> int | None:
    """Return to how many tokens every prompt of a model is padded; None if padding is masked out."""
    return int(config.text_config.max_position_embeddings) if config.model_type in READS_PADDING else None


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text, neither padded nor cut."""
    with naming("the model's tokenizer"):
        return [list(ids) for ids in tokenizer(texts, padding=False, truncation=False)["input_ids"]]


def _image_features(model: nn.Module, batch: Batch) -> Tensor:
    with only_the_pooled_row(model):
        return _pooled(cast(Any, model).get_image_features(pixel_values=batch["pixel_values"]))


def _pooled(output: Any) -> Tensor:
    """Return the features themselves: newer releases of transformers wrap them in an output object."""
    return cast(Tensor, output if isinstance(output, Tensor) else output.pooler_output)
