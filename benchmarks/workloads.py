"""Models with data to time the phases on, by name; all but `mini` have random weights, as the sizes decide the time.

Every workload has two tasks with the same examples in the same order: `task` is what the library makes of the data,
`padded` is the same with what a naive program wastes: prompts at the full context length, encoded for every batch, and
padding among the features.

    python benchmarks/workloads.py --workload vit_b16
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from keeplora.data.cache import Pixels
from keeplora.layers.lora import linear_targets
from keeplora.methods.keeplora import KeepLoRAConfig
from keeplora.models.dual_encoder import ClassificationTask
from keeplora.models.interfaces import StreamTask
from keeplora.runs.open import load_stream
from keeplora.task import Batch, DeferredGradient

WORDS = (
    "red blue green old new small large wild long short dark pale north south river stone wood glass iron silk "
    "cat dog horse bird fish tree boat train lamp chair cup clock tower bridge garden flower cloud bread apple drum"
)
TEMPLATE = ("a", "photo", "of", "a")
BOS, EOS, FIRST_WORD = 49406, 49407, 320
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """Which workload, and how much of it."""

    workload: Literal["mini", "vit_b16", "llama_block"] = "mini"
    """mini: the embedded model and its first task; vit_b16: CLIP ViT-B/16; llama_block: blocks of a Llama."""
    images: int = 128
    """Training examples."""
    test_images: int = 128
    """Held-out examples."""
    classes: int = 100
    """Classes of the task, each with a prompt (vit_b16)."""
    batch_size: int = 64
    """Examples in a batch."""
    depth: int | None = None
    """Blocks of each tower; all of them, or one for llama_block, if not given."""
    image_size: int = 224
    """Side of the images in pixels (vit_b16)."""
    width: int | None = None
    """Width of both towers of vit_b16, a multiple of 64; ViT-B/16's own, 768 and 512, if not given."""
    learned_tasks: int = 0
    """Tasks learned before: each left 1/16 of the input dimensions that the principal subspace leaves, as random
    directions, in every basis."""
    hidden: int = 4096
    """Width of llama_block."""
    intermediate: int = 11008
    """Width between the layers of its feed-forward part."""
    length: int = 32
    """Tokens of its longest sequence; the shortest has a quarter of them."""
    seed: int = 0
    """Seed of the weights and of the data."""


@dataclass(frozen=True)
class Workload:
    """A model, a task of it in two forms, and what the method is told."""

    config: WorkloadConfig
    model: nn.Module
    task: StreamTask
    padded: StreamTask
    options: KeepLoRAConfig
    rows: Callable[[str], int]
    """How many rows a target layer reads in one batch of the padded task."""
    targets: list[str] = field(default_factory=list)
    """The target layers; filled in."""

    def __post_init__(self) -> None:
        self.targets.extend(linear_targets(self.model, self.options.targets))


class PaddedClassification(ClassificationTask):
    """Classification by prompts of full length, which are encoded again for every batch, and padding that counts."""

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits of a call of the model as it is, `[n, num_classes]`."""
        logits: Tensor = model(pixel_values=batch["pixel_values"], **self.prompts).logits_per_image
        return logits

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[list[DeferredGradient]]:
        """Keep nothing."""
        yield []

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Count every row."""
        return None


class TokenTask(StreamTask):
    """Random sequences of unequal length for a causal language model; the answer is the last token's successor."""

    def __init__(self, config: WorkloadConfig, vocabulary: int, *, padding_counts: bool) -> None:
        self.name = "tokens"
        self.config = config
        self.padding_counts = padding_counts
        self.data = [self._batches(config.images, config.seed, vocabulary)]
        self.data.append(self._batches(config.test_images, config.seed + 1, vocabulary))

    def _batches(self, count: int, seed: int, vocabulary: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        length = self.config.length
        ids = torch.randint(3, vocabulary, (count, length), generator=generator)
        lengths = torch.randint(max(2, length // 4), length + 1, (count, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        parts = {key: value.split(self.config.batch_size) for key, value in batch.items()}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def batches(self) -> Iterable[Batch]:
        """Return the training batches."""
        return self.data[0]

    def test_batches(self) -> Iterable[Batch]:
        """Return the held-out batches."""
        return self.data[1]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the next token."""
        logits = self.outputs(model, batch)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, `[n, length, vocabulary]`."""
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the most likely last token, `[n]`."""
        last = batch["attention_mask"].sum(1) - 2
        return self.outputs(model, batch)[torch.arange(len(last)), last].argmax(-1)

    def references(self, batch: Batch) -> Tensor:
        """Return the last token, `[n]`."""
        last = batch["attention_mask"].sum(1) - 1
        answers: Tensor = batch["input_ids"][torch.arange(len(last)), last]
        return answers

    def padding_mask(self, layer: str, batch: Batch) -> Tensor | None:
        """Leave padding out, unless it counts."""
        return None if self.padding_counts else batch["attention_mask"]


def require_cpu() -> None:
    """Stop where training would find a GPU that nothing else here uses."""
    if torch.cuda.is_available():
        raise SystemExit("these benchmarks time the CPU; hide the GPU from them: CUDA_VISIBLE_DEVICES= python ...")


def load(config: WorkloadConfig) -> Workload:
    """Make the model and the data of a workload."""
    return WORKLOADS[config.workload](config)


def mini(config: WorkloadConfig) -> Workload:
    """Load the embedded model and its first task; classes are the task's own."""
    model, task = _mini_task()
    train = _first(task.batches(), config.images, config.seed)
    test = _first(task.test_batches(), config.test_images, config.seed)
    return _dual_encoder(config, copy.deepcopy(model), (train, test), task.prompts)


def vit_b16(config: WorkloadConfig) -> Workload:
    """Make CLIP ViT-B/16 with random weights, random images, and prompts of realistic length."""
    torch.manual_seed(config.seed)
    depth = {} if config.depth is None else {"num_hidden_layers": config.depth}
    vision, text = (tower_sizes(config.width or width) | depth for width in (768, 512))
    vision |= {"image_size": config.image_size, "patch_size": 16}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    train = _random_pixels(config, config.images, config.seed)
    test = _random_pixels(config, config.test_images, config.seed + 1)
    return _dual_encoder(config, model, (train, test), prompts_of(config.classes))


def tower_sizes(width: int) -> dict[str, int]:
    """Return the sizes of a tower of CLIP by its width."""
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}


def llama_block(config: WorkloadConfig) -> Workload:
    """Make a Llama of few blocks with random weights and a small vocabulary, and random token sequences."""
    torch.manual_seed(config.seed)
    vocabulary = 1000
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=config.hidden, intermediate_size=config.intermediate,
            num_hidden_layers=config.depth or 1, num_attention_heads=max(1, config.hidden // 128),
            max_position_embeddings=config.length, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    options = KeepLoRAConfig(rank=64, alpha=128.0, targets=LLAMA_TARGETS, weight_energy=0.6)
    task, padded = (TokenTask(config, vocabulary, padding_counts=counts) for counts in (False, True))
    rows = min(config.batch_size, config.images) * config.length
    return Workload(config, model, task, padded, options, lambda name: rows)


WORKLOADS: dict[str, Callable[[WorkloadConfig], Workload]] = {
    "mini": mini,
    "vit_b16": vit_b16,
    "llama_block": llama_block,
}


def prompts_of(num_classes: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of "a photo of a NAME ." for names of two to four words.

    They all differ, up to 1600.
    """
    some = WORDS.split()
    size = len(some)
    words = [(some[n % size], some[n // size % size], some[n % 7], some[n % 11]) for n in range(num_classes)]
    names = [name[: 2 + n % 3] for n, name in enumerate(words)]
    number = {word: FIRST_WORD + i for i, word in enumerate(dict.fromkeys([*TEMPLATE, *some, "."]))}
    ids = [[BOS, *(number[word] for word in (*TEMPLATE, *name, ".")), EOS] for name in names]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [EOS] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


def at_full_length(prompts: dict[str, Tensor], length: int, padding: int) -> dict[str, Tensor]:
    """Pad prompts to the whole context; a causal tower that reads its answer at the end of the text needs no mask."""
    ids = prompts["input_ids"]
    return {"input_ids": F.pad(ids, (0, length - ids.shape[1]), value=padding)}


def _dual_encoder(
    config: WorkloadConfig, model: nn.Module, splits: tuple[Pixels, Pixels], prompts: dict[str, Tensor]
) -> Workload:
    model_config: Any = model.config
    vision, text = model_config.vision_config, model_config.text_config
    padding = EOS if config.workload == "vit_b16" else text.pad_token_id
    full = at_full_length(prompts, text.max_position_embeddings, padding)
    train, test = splits
    sizes = {"batch_size": config.batch_size, "seed": config.seed}
    task = ClassificationTask("cut", train, test, prompts, **sizes)
    padded = PaddedClassification("padded", train, test, full, **sizes)
    of_images = min(config.batch_size, len(train)) * ((vision.image_size // vision.patch_size) ** 2 + 1)
    of_prompts = full["input_ids"].numel()
    rows = {"text_model": of_prompts, "vision_model": of_images}
    return Workload(config, model, task, padded, KeepLoRAConfig(), lambda name: rows[name.split(".")[0]])


@cache
def _mini_task() -> tuple[nn.Module, Any]:
    model, tasks = load_stream()
    return model, tasks[0]


def _first(loader: DataLoader[Any], count: int, seed: int) -> Pixels:
    """Return some images of a split, drawn at random."""
    split: Any = loader.dataset
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return Pixels(tuple(split.labels[i] for i in chosen), split.pixels[chosen], split.normalise)


def _random_pixels(config: WorkloadConfig, count: int, seed: int) -> Pixels:
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % config.classes
    return Pixels(tuple(labels.tolist()), pixels, lambda batch: batch.float() / 127.5 - 1)


def as_flags(config: WorkloadConfig) -> list[str]:
    """Return the command line flags that give a config."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    return [text for key, value in values.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def main(config: tyro.conf.OmitArgPrefixes[WorkloadConfig]) -> None:
    """Print what a workload consists of."""
    workload = load(config)
    parameters = sum(parameter.numel() for parameter in workload.model.parameters())
    print(f"{config.workload}: {parameters / 1e6:.1f} million parameters, {len(workload.targets)} target layers")
    shapes = [tuple(workload.model.get_parameter(f"{name}.weight").shape) for name in workload.targets]
    for shape in dict.fromkeys(shapes):
        rows = {workload.rows(name) for name, own in zip(workload.targets, shapes, strict=True) if own == shape}
        print(f"  {shapes.count(shape)} of {shape[0]} x {shape[1]}; rows in a padded batch: {sorted(rows)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
