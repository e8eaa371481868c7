"""How close the one-pass sketch comes to the exact directions of the gradient: on `mini`, and on a 7B-width layer.

The sketch finds what stands out. Directions whose singular values hardly differ from the next ones' are not found, nor
are they much better than those next ones: `falls to` is the singular value of the last direction asked for, as a share
of the first one's, and `energy` what the sketched directions hold of the gradient, as a share of what the best hold.

python benchmarks/sketch.py --workload mini
python benchmarks/sketch.py --workload llama_block
"""

import math
import statistics
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import tyro
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from keeplora.layers.gradients import exact_residuals, sketched_residuals
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.progress import silent
from keeplora.runs.open import load_stream
from keeplora.task import Task
from workloads import LLAMA_TARGETS

SIGNIFICANT = 1e-3
"""Directions whose singular value is below this share of the first are left out: no training would find them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare on."""

    workload: Literal["mini", "llama_block"] = "mini"
    """The embedded model on its first tasks; or all layers of a block of width 4096 with random weights, on made-up
    questions about images with answers of one word, and on made-up text, the loss of which is of every token."""
    rank: int = 16
    """How many directions are asked for."""
    tasks: int = 3
    """How many tasks of mini."""


class Questions(Task):
    """One question about images of ten kinds, to be answered by one word: the loss is of the answer alone.

    An image is 48 embeddings: of its kind, of the place in it, and noise. Their covariance falls off as 1 / n².
    """

    name = "questions"

    def __init__(self, embedding: nn.Embedding, num_kinds: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        kinds = torch.arange(64) % num_kinds
        directions = normal(256, embedding.embedding_dim) / torch.arange(1, 257).unsqueeze(1)
        codes = normal(num_kinds, 1, 256)[kinds] + normal(48, 256) + normal(64, 48, 256)
        images = codes @ directions
        words = torch.randint(num_kinds, embedding.num_embeddings, (16,), generator=generator)
        with torch.no_grad():
            images *= embedding.weight.std() / images.std()
            question = embedding(words).expand(64, -1, -1)
            self.data = list(zip(torch.cat([images, question], 1).split(8), kinds.split(8), strict=True))

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the batches: embeddings and answers."""
        return self.data

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy of the answers."""
        embeddings, answers = batch
        return F.cross_entropy(model(inputs_embeds=embeddings).logits[:, -1], answers)


class Text(Task):
    """Random tokens in which the next one follows from the last two, so that there is something to learn."""

    name = "text"

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (16, 64), generator=generator)
        for place in range(2, 64):
            ids[:, place] = (3 * ids[:, place - 1] + ids[:, place - 2]) % vocabulary
        self.data = list(ids.split(4))

    def batches(self) -> list[torch.Tensor]:
        """Return the batches."""
        return self.data

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the next token."""
        logits = model(input_ids=batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


class Found(NamedTuple):
    """How good a layer's sketched directions are."""

    angle: float
    """The largest principal angle in degrees between the significant leading directions, exact and sketched."""
    directions: int
    """How many of them are significant."""
    falls_to: float
    """The last one's singular value, as a share of the first one's."""
    energy: float
    """The energy of the gradient in the sketched directions, as a share of that in the exact ones."""


def quality(exact: torch.Tensor, rows: torch.Tensor, rank: int) -> Found:
    """Compare the rows that a sketch found with the exact residual gradient."""
    s, vh = leading(exact.double(), rank)
    n = int((s > SIGNIFICANT * s[0]).sum())
    approximate = torch.linalg.svd(rows.double(), full_matrices=False)[2][:n]
    cosines = torch.linalg.svdvals(vh[:n] @ approximate.T)
    smallest = float(cosines[-1]) if len(approximate) == n else 0.0  # A direction that was not found is at 90 degrees.
    energy = float((exact.double() @ approximate.T).square().sum() / s[:n].square().sum())
    return Found(math.degrees(math.acos(min(1.0, smallest))), n, float(s[n - 1] / s[0]), energy)


def leading(exact: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading singular values and right singular vectors of a float64 matrix, by its smaller side's gram."""
    d_out, d_in = exact.shape
    energies, vectors = torch.linalg.eigh(exact @ exact.T if d_out < d_in else exact.T @ exact)
    s, vectors = energies.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]
    return s, (vectors.T @ exact) / s.clamp_min(1e-300).unsqueeze(1) if d_out < d_in else vectors.T


def compare(model: nn.Module, task: Task, config: Config, targets: tuple[str, ...]) -> None:
    """Print the angles of every layer's directions, worst first."""
    method = KeepLoRA(KeepLoRAConfig(rank=config.rank, targets=targets, weight_energy=0.3))
    method.protect(model)
    exact, sketched = (
        residuals(model, task, method.bases, config.rank, 1.0, silent)
        for residuals in (exact_residuals, sketched_residuals)
    )
    layers = {name: quality(exact.rows[name], sketched.rows[name], config.rank) for name in method.bases}
    median = statistics.median(found.angle for found in layers.values())
    print(f"{task.name}: {len(layers)} layers, median {median:.3g} degrees; the worst:")
    for name, found in sorted(layers.items(), key=lambda item: -item[1].angle)[:3]:
        print(
            f"  {found.angle:8.3g} degrees, {found.directions} directions, falls to {found.falls_to:.2g},"
            f" energy {found.energy:.4f}  {name}"
        )


def main(config: Config) -> None:
    """Compare on the chosen workload."""
    if config.workload == "mini":
        model, tasks = load_stream()
        for task in tasks[: config.tasks]:
            compare(model, task, config, KeepLoRAConfig.targets)
        return
    torch.manual_seed(0)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **sizes)).eval()
    for task in (Questions(model.get_input_embeddings()), Text(512)):
        compare(model, task, config, LLAMA_TARGETS)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
