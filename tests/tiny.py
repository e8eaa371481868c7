"""Small models and data for the tests, made on the spot from seeds; every layer has d_in != d_out != r somewhere."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from keeplora.config import parse
from keeplora.data.cache import Pixels
from keeplora.layers.lora import SavedAdapter
from keeplora.methods.registry import find_method
from keeplora.models.dual_encoder import ClassificationTask, tokenise
from keeplora.runs.config import RunConfig, resolve
from keeplora.task import Task, to_device
from keeplora.training.state_file import pack
from keeplora.training.trainer import TrainConfig

SIZE = 16
WORDS = ["a", "drawing", "of", "photo", ".", "red", "green", "blue", "dark", "big", "square", "thing"]
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}


def tokenizer(*, masked: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<unk>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=12,
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    )


def clip_config(layers: int = 2) -> CLIPConfig:
    text = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": layers,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 3,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": 3,
              "image_size": SIZE, "patch_size": 8}  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)


def clip_model(seed: int = 0, layers: int = 2) -> CLIPModel:
    torch.manual_seed(seed)
    return _spread(CLIPModel(clip_config(layers)))


def siglip_config() -> SiglipConfig:
    text = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 3,
            "pad_token_id": 0, "projection_size": 24}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": SIZE, "patch_size": 8}  # fmt: skip
    return SiglipConfig(text_config=text, vision_config=vision)


def siglip_model(seed: int = 0) -> SiglipModel:
    torch.manual_seed(seed)
    model = SiglipModel(siglip_config())
    nn.init.constant_(model.logit_scale, 2.5)
    return _spread(model)


def _spread(model: nn.Module) -> nn.Module:
    """Give the attention weights a spectrum that falls off, as trained ones have."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                u, s, vh = torch.linalg.svd(torch.randn_like(module.weight), full_matrices=False)
                module.weight.copy_(u * (0.8 ** torch.arange(len(s))) @ vh)
    return model.eval()


def save_dual_encoder(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    """Save a tiny random dual encoder as a Hugging Face folder."""
    size = {"height": SIZE, "width": SIZE}
    if kind == "clip":
        clip_model(seed).save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    else:
        siglip_model(seed).save_pretrained(folder)
        SiglipImageProcessorPil(size=size).save_pretrained(folder)
    tokenizer(masked=kind == "clip").save_pretrained(folder)
    return folder


def write_images(folder: Path, *, per_class: int = 6, seed: int = 0, dark: bool = False) -> Path:
    """Write SPLIT/CLASS/IMAGE with one noisy colour a class."""
    generator = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name, color in COLORS.items():
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                base = np.array(color) * (0.4 if dark else 1.0)
                noise = generator.normal(0, 60, (SIZE + 4, SIZE, 3))
                pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    return folder


def write_benchmark(folder: Path, *, tasks: int = 2, per_class: int = 6) -> Path:
    """Write a small benchmark of colour tasks and return its TOML file."""
    lines = []
    for i in range(tasks):
        write_images(folder / f"data{i}", seed=i, dark=i % 2 == 1, per_class=per_class)
        template = "a drawing of a {}." if i % 2 == 0 else "a photo of a big dark {} thing."
        lines += ["[[tasks]]", f'name = "task{i}"', f'path = "data{i}"', f'template = "{template}"', ""]
    path = folder / "colors.toml"
    path.write_text("\n".join(lines))
    return path


class MLP(nn.Module):
    """Three linear layers of different widths."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(11, 17)
        self.fc2 = nn.Linear(17, 13)
        self.out = nn.Linear(13, 5)
        _spread(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class VectorTask(Task):
    """Random vectors with labels from a random linear map; batches of unequal size."""

    def __init__(self, name: str = "vectors", seed: int = 0, sizes: tuple[int, ...] = (8, 8, 5)) -> None:
        self.name = name
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(11, 11, generator=generator) * (0.6 ** torch.arange(11))
        rows = torch.randn(sum(sizes), 11, generator=generator) @ mixing.T
        labels = (rows @ torch.randn(11, 5, generator=generator)).argmax(1)
        self.data = list(zip(rows.split(list(sizes)), labels.split(list(sizes)), strict=True))

    def batches(self):
        return self.data

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def outputs(self, model, batch):
        return model(batch[0])


class TokenTask(Task):
    """Random token sequences with padding for a causal language model."""

    def __init__(self, name: str = "tokens", seed: int = 0) -> None:
        self.name = name
        generator = torch.Generator().manual_seed(seed)
        self.data = []
        for _ in range(3):
            ids = torch.randint(1, 30, (4, 7), generator=generator)
            mask = torch.arange(7) < torch.tensor([7, 4, 6, 5]).unsqueeze(1)
            self.data.append({"input_ids": ids * mask, "attention_mask": mask.long()})

    def batches(self):
        return self.data

    def loss(self, model, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch, labels=labels).loss

    def outputs(self, model, batch):
        return model(**batch).logits

    def padding_mask(self, layer, batch):
        return batch["attention_mask"]


def llama_model(seed: int = 0) -> LlamaForCausalLM:
    """A grouped-query model: k and v are narrower than q."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _spread(LlamaForCausalLM(config))


class WideMLP(MLP):
    """Layers wide enough for many tasks, none of them square."""

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 56)
        self.out = nn.Linear(56, 5)
        _spread(self)


class NarrowTask(VectorTask):
    """Vectors `[n, 64]` that lie in a few directions, other ones for every seed."""

    def __init__(self, name: str = "narrow", seed: int = 0, sizes: tuple[int, ...] = (8, 8, 5)) -> None:
        self.name = name
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(sum(sizes), 4, generator=generator) @ torch.randn(4, 64, generator=generator)
        labels = (rows @ torch.randn(64, 5, generator=generator)).argmax(1)
        self.data = list(zip(rows.split(list(sizes)), labels.split(list(sizes)), strict=True))


CLASSES = ["red", "dark green", "big dark blue"]


def classification_task(
    name: str = "colors", seed: int = 0, *, kind: str = "clip", per_class: int = 5, batch_size: int = 6
) -> ClassificationTask:
    """Noisy colours in memory; prompts of unequal length, batches of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    labels = tuple(i % len(CLASSES) for i in range(len(CLASSES) * per_class))
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float32)[list(labels), :, None, None]
    noise = 60 * torch.randn(len(labels), 3, SIZE, SIZE, generator=generator)
    images = (colors + noise).clamp(0, 255).to(torch.uint8)
    pixels = Pixels(labels, images, lambda batch: batch.float() / 127.5 - 1)
    template = ["a drawing of a {}.", "a photo of a {} thing."][seed % 2]
    config = clip_config() if kind == "clip" else siglip_config()
    prompts = tokenise(tokenizer(), [template.format(label) for label in CLASSES], name, config)
    return ClassificationTask(name, pixels, pixels, prompts, batch_size=batch_size, seed=seed)


def train(model: nn.Module, task: Task, *, epochs: int = 2, optimizer=torch.optim.SGD, **options) -> None:
    """Train what requires a gradient with a plain loop, as a user of the verbs would."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    steps = optimizer(parameters, **({"lr": 0.1} | options))
    for _ in range(epochs):
        for batch in task.batches():
            loss = task.loss(model, to_device(batch, parameters[0].device))
            steps.zero_grad()
            loss.backward()
            steps.step()


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def lasting(folder: Path) -> tuple[dict[str, bytes], str]:
    """Return what must be equal in equal runs: everything that was learned, and the scores, without times."""
    files = {name: content for name, content in tree(folder).items() if name.startswith(("tasks/", "model/"))}
    for name, content in files.items():
        if name.endswith("task.json"):
            details = json.loads(content)
            del details["phases"]
            files[name] = json.dumps(details).encode()
    metrics = json.loads((folder / "metrics.json").read_text())
    return files, json.dumps({key: metrics[key] for key in metrics if key not in ("seconds", "peak_memory_mb")})


def write_adapter(folder: Path, saved: SavedAdapter) -> Path:
    """Write a saved adapter as a run directory holds it, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in saved.files().items():
        (folder / name).write_bytes(content)
    return folder


def run_config(place: Path, output: Path, name: str, *, feature_energy: float, **changes) -> RunConfig:
    """Return a short run of a method or variant on the stream and the model in a folder."""
    kind, variant = find_method(name)
    protects = {"feature_energy": feature_energy, "weight_energy": 0.3} if name.startswith("keeplora") else {}
    values = {
        "benchmark": str(place / "colors.toml"),
        "model": str(place / "model"),
        "method": name,
        "train": TrainConfig(epochs=1, batch_size=5, learning_rate=0.05),
        "options": parse(kind.Config, {"rank": 2, **protects, **variant}, source=name),
    }
    return RunConfig(**values | {"output": output} | changes)


def to_bytes(state) -> bytes:
    """Return a state as the content of a safetensors file, as a run writes it."""
    tensors, metadata = pack(state)
    return save({name: value.contiguous() for name, value in tensors.items()}, metadata=metadata)


def autograd_gradients(model, task, layers) -> dict[str, torch.Tensor]:
    """Average the gradients of a task's whole batches by their weight, as autograd gives them."""
    weights = [model.get_parameter(f"{name}.weight").requires_grad_() for name in layers]
    sums, total = [torch.zeros_like(weight) for weight in weights], 0.0
    for batch in task.batches():
        found = torch.autograd.grad(task.loss(model, batch), weights, allow_unused=True)
        for one, gradient in zip(sums, found, strict=True):
            one.add_(0 if gradient is None else gradient, alpha=task.weight(batch))
        total += task.weight(batch)
    return {name: one / total for name, one in zip(layers, sums, strict=True)}


def resolved(benchmark: str, method: str, values: dict | None = None) -> RunConfig:
    """Return the settings of a run of a method on a benchmark, with some values given."""
    return resolve(("test", {"benchmark": benchmark, "method": method, **(values or {})}))
