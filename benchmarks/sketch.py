"""How close the one-pass sketch comes to the exact directions of the gradient: on `mini`, and on a 7B-width layer.

python benchmarks/sketch.py --workload mini
python benchmarks/sketch.py --workload llama_block
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from keeplora.collect import silent
from keeplora.methods import KeepLoRA, KeepLoRAConfig
from keeplora.residual import exact_residuals, sketched_residuals
from keeplora.stream import load_stream
from keeplora.task import Task

SIGNIFICANT = 1e-3
"""Directions whose singular value is below this share of the first are left out: no training would find them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare on."""

    workload: Literal["mini", "llama_block"] = "mini"
    """The embedded model on its first tasks, or one block of a Llama of width 4096 with random weights."""
    rank: int = 16
    """How many directions are asked for."""
    tasks: int = 3
    """How many tasks of mini."""


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


def largest_angle(exact: torch.Tensor, rows: torch.Tensor, rank: int) -> tuple[float, int]:
    """Return the largest principal angle in degrees between the significant leading directions, and their number."""
    _, s, vh = torch.linalg.svd(exact, full_matrices=False)
    n = min(rank, int((s > SIGNIFICANT * s[0]).sum()))
    approximate = torch.linalg.svd(rows, full_matrices=False)[2][:n]
    cosines = torch.linalg.svdvals(vh[:n].double() @ approximate.double().T)
    return math.degrees(math.acos(min(1.0, float(cosines[n - 1])))), n


def compare(model: nn.Module, task: Task, config: Config, targets: tuple[str, ...]) -> None:
    """Print the angles of every layer's directions, worst first."""
    method = KeepLoRA(KeepLoRAConfig(rank=config.rank, targets=targets, weight_energy=0.3))
    method.protect_principal(model)
    exact, sketched = (
        residuals(model, task, method.bases, config.rank, 1.0, silent)
        for residuals in (exact_residuals, sketched_residuals)
    )
    angles = {
        name: largest_angle(exact[f"{name}.residual"], sketched[f"{name}.residual"], config.rank)
        for name in method.bases
    }
    worst = sorted(angles, key=lambda name: -angles[name][0])
    middle = sorted(angle for angle, _ in angles.values())[len(angles) // 2]
    print(f"{task.name}: {len(angles)} layers, median {middle:.3g} degrees; the worst:")
    for name in worst[:3]:
        print(f"  {angles[name][0]:8.3g} degrees, {angles[name][1]} directions  {name}")


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
    compare(model, Text(512), config, ("q_proj", "k_proj", "v_proj", "o_proj"))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
