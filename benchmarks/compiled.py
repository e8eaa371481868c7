"""Time a training step of a KeepLoRA-adapted vit_b16 with and without fused layers and `torch.compile`, in turns.

Four copies of the model with stock PEFT layers: one as it is, one inside `keeplora.fused_layers`, one compiled,
one with both. `first step` is the seconds of the first forward and backward pass, in which what is compiled is built.
Compilation on a CPU needs a C++ compiler.

    python benchmarks/compiled.py --repeats 5
    python benchmarks/compiled.py --quick
"""

import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from keeplora.layers.fused_forward import fused_layers
from matmul import one_method
from phases import spread
from workloads import WorkloadConfig, load, require_cpu

STOCK, FUSED, COMPILED, BOTH = "stock PEFT", "fused_layers", "torch.compile", "both"
WAYS = (STOCK, FUSED, COMPILED, BOTH)

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class CompiledConfig(WorkloadConfig):
    """What to time."""

    workload: Literal["vit_b16"] = "vit_b16"
    """CLIP ViT-B/16 with random weights."""
    images: int = 64
    """Training examples; one batch of them is used."""
    depth: int | None = 2
    """Blocks of each tower."""
    repeats: int = 5
    """How often each way takes its turn."""
    backend: str = "inductor"
    """Of `torch.compile`."""
    quick: bool = False
    """Make sure in seconds that everything runs: tiny, once, traced but not compiled; the figures mean nothing."""


def main(config: tyro.conf.OmitArgPrefixes[CompiledConfig]) -> None:
    """Time, and print a Markdown table."""
    require_cpu()
    if config.quick:
        config = dataclasses.replace(
            config, images=2, batch_size=2, classes=3, depth=1, image_size=32, width=64, repeats=1, backend="aot_eager"
        )
    print(table(*timed(config)))


def timed(config: CompiledConfig) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return by way the seconds of the first step, and those of every repeat."""
    with ExitStack() as lent:
        steps = {way: step_of(config, way, lent) for way in WAYS}
        first = {way: _seconds(step) for way, step in steps.items()}
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(config.repeats):
            for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
                found[way].append(_seconds(steps[way]))
    return first, found


def step_of(config: CompiledConfig, way: str, lent: ExitStack) -> Step:
    """Make an adapted model of its own for a way, and return its forward and backward pass."""
    workload = load(config)
    adapted = one_method("keeplora", workload.options).before_task(workload.model, workload.task).train()
    # A compiled tower computes its last layer for all rows; a hook that does nothing has the others do so as well.
    workload.model.get_submodule("vision_model.encoder").register_forward_hook(lambda *_: None)
    batch = copy.deepcopy(next(iter(workload.task.batches())))
    if way in (FUSED, BOTH):
        lent.enter_context(fused_layers(adapted))
    model = torch.compile(adapted, backend=config.backend) if way in (COMPILED, BOTH) else adapted

    def step() -> None:
        workload.task.loss(model, batch).backward()
        adapted.zero_grad()

    return step


def table(first: dict[str, float], found: dict[str, list[float]]) -> str:
    """Return the median seconds, and their ratio to stock PEFT's of the same turn with its range."""
    head = ["step", "s", f"{STOCK} / this", "first step, s", "steps until the first one is paid back"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    stock, fused = (statistics.median(found[way]) for way in (STOCK, FUSED))
    for way, seconds in found.items():
        median = statistics.median(seconds)
        ratios = [other / own for own, other in zip(seconds, found[STOCK], strict=True)]
        before = fused if way == BOTH else stock
        saved = before - median
        steps = f"{(first[way] - median) / saved:.0f}" if way in (COMPILED, BOTH) and saved > 0 else ""
        lines.append(f"| {way} | {median:.3g} | {spread(ratios)} | {first[way]:.3g} | {steps} |")
    repeats = len(found[STOCK])
    note = f"{repeats} repeats in turns; what `both` pays back is counted against fused_layers."
    return "\n".join([*lines, "", note])


def _seconds(step: Step) -> float:
    since = time.perf_counter()
    step()
    return time.perf_counter() - since


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tyro.cli(main, description=__doc__)
