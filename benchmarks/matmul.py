"""Measure how near the library comes to what the machine can do.

The rate of float32 matrix products (square ones, and the tall ones of `collect`), the share of it that the accumulation
of input grams and a training step reach, the library's eigensolver against those of numpy and scipy, and what the SVD
of a token matrix costs in its place.

    python benchmarks/matmul.py --parts rate grams eigh --widths 512 768 1024
    python benchmarks/matmul.py --parts step --workload vit_b16 --images 64
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.linalg
import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from keeplora.layers.gradients import residuals_of
from keeplora.layers.lora import linear_targets
from keeplora.layers.statistics import InputCovariance
from keeplora.methods.base import Method
from keeplora.methods.baselines import LoRAFT
from keeplora.methods.keeplora import KeepLoRA
from keeplora.subspace import linear_algebra as linalg
from keeplora.training.trainer import TrainConfig, fit
from phases import machine, spread
from workloads import WorkloadConfig, load, require_cpu

Part = Literal["rate", "grams", "eigh", "residual", "svd", "step"]
Work = Callable[[], object]
Row = dict[str, Any]

PAUSE = 0.2
"""Seconds."""

RESIDUAL = "keeplora.subspace.linear_algebra.residual_directions"
GRAM = "gram and its eigenvectors"
SQUARE, LIBRARY, OURS = "square", "keeplora.subspace.linear_algebra.top_directions", "keeplora / this"


@dataclass(frozen=True, kw_only=True)
class MatmulConfig(WorkloadConfig):
    """What to measure."""

    parts: tuple[Part, ...] = ("rate", "grams", "eigh")
    """rate: matrix products; grams: the accumulation of input grams; eigh: eigensolvers; residual: the directions of a
    gram outside a basis; svd: the directions of a token matrix by SVD, either way round, and by its gram; step: a
    training step of the workload by lora_ft and by keeplora."""
    sides: tuple[int, ...] = (2048, 4096)
    """Sides of the square matrices whose product gives the machine's rate; shares are of the largest one's."""
    widths: tuple[int, ...] = (512, 768, 1024, 2048, 4096)
    """d_in of the grams and the eigenproblems; grams only from 768 on."""
    rows: int = 12608
    """Rows of a batch: 64 images of 197 tokens."""
    repeats: int = 5
    """How often each is measured."""
    protected: float = 0.5
    """Share of the dimensions that the basis of `residual` takes."""
    limit: float = 60.0
    """Leave a solver out at a width where it would take more seconds, by what it took at a smaller one."""
    output: Path = Path("runs/benchmarks/matmul.json")
    """File for the results."""


def main(config: tyro.conf.OmitArgPrefixes[MatmulConfig]) -> None:
    """Measure, write the results as JSON, and print them as Markdown."""
    require_cpu()
    results: dict[str, list[Row]] = {}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        results[part] = PARTS[part](config)
        print(f"{part}\n\n{table(results[part])}\n", flush=True)
        config.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


def rates(config: MatmulConfig) -> list[Row]:
    """Measure square matrix products."""
    works = {f"square {side}": square(side) for side in config.sides}
    found = in_turns(works, config.repeats)
    flops = [2 * side**3 for side in config.sides]
    return [
        {"product": name} | _rate(count, seconds) for (name, seconds), count in zip(found.items(), flops, strict=True)
    ]


def square(side: int) -> Work:
    """Return the product of two square matrices."""
    x, y, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    return lambda: torch.mm(x, y, out=out)


def grams(config: MatmulConfig) -> list[Row]:
    """Measure what `input_grams` does with the rows of a batch, and plain products of the same shape.

    Products are counted as 2 * rows * d_in ** 2, though a gram is symmetric: `syrk`, which computes one half only,
    may so pass the machine's rate.
    """
    found = []
    side = max(config.sides)
    for width in (width for width in config.widths if width >= 768):
        ways = accumulations(config.rows, width)
        times = in_turns({name: work for name, (_, work) in ways.items()} | {SQUARE: square(side)}, config.repeats)
        for name, (count, _) in ways.items():
            flops = 2 * count * width**2
            share = _share(flops, times[name], 2 * side**3, times[SQUARE])
            found.append({"d_in": width, "what": name} | _rate(flops, times[name]) | share)
    return found


def accumulations(num_rows: int, width: int) -> dict[str, tuple[int, Work]]:
    """Return ways to add rows to a gram by name: how many rows it counts, and the work."""
    rows, total = torch.randn(num_rows, width), torch.zeros(width, width)
    inputs = rows.unsqueeze(0)
    real = torch.rand(inputs.shape[:-1]) < 0.9
    halves, in_numpy = rows.bfloat16(), rows.numpy().T
    whole, masked, half = (InputCovariance() for _ in range(3))
    return {
        "mm": (num_rows, lambda: torch.mm(rows.T, rows, out=total)),
        "addmm_ in place": (num_rows, lambda: total.addmm_(rows.T, rows)),
        "syrk of scipy, one half": (num_rows, lambda: scipy.linalg.blas.ssyrk(1.0, in_numpy)),
        "collect": (num_rows, lambda: whole.add(rows, None, 1.0)),
        "collect, padding left out": (int(real.sum()), lambda: masked.add(inputs[real], None, 1.0)),
        "collect, bfloat16 inputs": (num_rows, lambda: half.add(halves, None, 1.0)),
    }


def eigensolvers(config: MatmulConfig) -> list[Row]:
    """Measure all eigenvalues and eigenvectors of the same float32 gram by every solver."""
    found: list[Row] = []
    last: dict[str, tuple[int, float]] = {}
    for width in config.widths:
        rows = torch.randn(2 * width, width) * 0.99 ** torch.arange(width)
        works = solvers(rows.T @ rows)
        slow = [name for name, (n, seconds) in last.items() if seconds * (width / n) ** 3 > config.limit]
        times = in_turns({name: work for name, work in works.items() if name not in slow}, config.repeats)
        for name in works:
            if name in slow:
                found.append({"d_in": width, "solver": name, "seconds": "left out", "range": "", OURS: ""})
                continue
            last[name] = (width, statistics.median(times[name]))
            ratio = [own / other for own, other in zip(times[LIBRARY], times[name], strict=True)]
            found.append({"d_in": width, "solver": name} | _median(times[name]) | {OURS: spread(ratio)})
    return found


def solvers(gram: Tensor) -> dict[str, Work]:
    """Return the eigensolvers by name."""
    array = gram.numpy()
    width = len(array)
    found: dict[str, Work] = {
        LIBRARY: lambda: linalg.top_directions(gram, 0.99),
        "torch.linalg.eigh": lambda: torch.linalg.eigh(gram),
        "numpy.linalg.eigh": lambda: np.linalg.eigh(array),
    }
    for driver in ("ev", "evd", "evr", "evx"):
        found[f"scipy {driver}"] = partial(scipy.linalg.eigh, array, driver=driver, check_finite=False)
    top = [width - width // 4, width - 1]
    found["scipy evr, top quarter"] = lambda: scipy.linalg.eigh(array, driver="evr", subset_by_index=top)
    return found


def residuals(config: MatmulConfig) -> list[Row]:
    """Measure the leading directions of a gram outside a basis: the library's way, and by eigensolvers of all of it."""
    found: list[Row] = []
    for width in config.widths:
        rows = torch.randn(2 * width, width) * 0.99 ** torch.arange(width)
        basis = torch.linalg.qr(torch.randn(width, int(config.protected * width)))[0]
        times = in_turns(ways_outside(rows.T @ rows, basis), config.repeats)
        for name, seconds in times.items():
            ratio = [own / other for own, other in zip(times[RESIDUAL], seconds, strict=True)]
            found.append({"d_in": width, "way": name} | _median(seconds) | {OURS: spread(ratio)})
    return found


def ways_outside(gram: Tensor, basis: Tensor) -> dict[str, Work]:
    """Return the ways to the directions outside a basis by name."""
    return {
        RESIDUAL: lambda: linalg.residual_directions(gram, basis, 0.99),
        "residual gram, torch.linalg.eigh": lambda: torch.linalg.eigh(linalg.residual_gram(gram, basis)),
        "residual gram, numpy.linalg.eigh": lambda: np.linalg.eigh(linalg.residual_gram(gram, basis).numpy()),
        "residual gram, scipy evd": lambda: scipy.linalg.eigh(
            linalg.residual_gram(gram, basis).numpy(), driver="evd", check_finite=False
        ),
    }


def decompositions(config: MatmulConfig) -> list[Row]:
    """Measure ways to the directions of a batch's inputs: SVD of the tokens as columns or as rows, or their gram."""
    found: list[Row] = []
    for width in (width for width in config.widths if width <= 1024):
        rows = torch.randn(config.rows, width) * 0.99 ** torch.arange(width)
        works: dict[str, Work] = {
            "SVD, a token in each column": lambda rows=rows: torch.linalg.svd(rows.T, full_matrices=False),
            "SVD, a token in each row": lambda rows=rows: torch.linalg.svd(rows, full_matrices=False),
            GRAM: lambda rows=rows: linalg.top_directions(rows.T @ rows, 0.99),
        }
        times = in_turns(works, config.repeats)
        for name, seconds in times.items():
            ratio = [slow / fast for slow, fast in zip(seconds, times[GRAM], strict=True)]
            found.append({"d_in": width, "way": name} | _median(seconds) | {f"this / {GRAM}": spread(ratio)})
    return found


def steps(config: MatmulConfig) -> list[Row]:
    """Measure a training step; its products are counted as those that torch's own operations stand for."""
    side = max(config.sides)
    product = square(side)
    found = []
    times: dict[str, list[float]] = {"lora_ft": [], "keeplora": []}
    squares: dict[str, list[float]] = {"lora_ft": [], "keeplora": []}
    flops = {}
    for repeat in range(config.repeats):
        for name in times if repeat % 2 == 0 else reversed(times):
            squares[name] += in_turns({SQUARE: product}, 1)[SQUARE]
            seconds, flops[name] = one_step(config, name)
            times[name].append(seconds)
    for name, count in flops.items():
        share = _share(count, times[name], 2 * side**3, squares[name])
        found.append({"step of": name, "GFLOP": round(count / 1e9, 1)} | _rate(count, times[name]) | share)
    return found


def one_step(config: MatmulConfig, name: str) -> tuple[float, int]:
    """Train for an epoch; return the seconds of a step and the operations of its products."""
    workload = load(config)
    adapted = one_method(name, workload.options).before_task(workload.model, workload.task)
    batches = list(workload.task.batches())
    with FlopCounterMode(display=False) as counter:
        workload.task.loss(adapted, batches[0]).backward()
    adapted.zero_grad()
    since = time.perf_counter()
    fit(adapted, workload.task, TrainConfig(epochs=1, batch_size=config.batch_size))
    return (time.perf_counter() - since) / len(batches), counter.get_total_flops()


def one_method(name: str, options: Any) -> Method:
    """Return the method; keeplora's protects nothing here and starts from a random gradient, as quick to train."""
    if name == "lora_ft":
        return LoRAFT(LoRAFT.Config(rank=options.rank, alpha=options.alpha, targets=options.targets))
    return _Unprotected(options)


class _Unprotected(KeepLoRA):
    """KeepLoRA without a principal subspace and without a gradient pass: what it trains is of the same size."""

    def protect(self, model: torch.nn.Module) -> None:
        """Protect nothing."""
        names = linear_targets(model, self.config.targets)
        weights = {name: model.get_parameter(f"{name}.weight") for name in names}
        self.bases = {name: weight.new_zeros(weight.shape[1], 0) for name, weight in weights.items()}
        random = residuals_of({name: torch.randn_like(weight) for name, weight in weights.items()}, self.bases)
        self.gradient = lambda model, task: random


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows)])


def in_turns(works: dict[str, Work], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every repeat of each work; they take turns, after a round that does not count.

    Each round starts with another one. A pause and an untimed call of the same work stand before each: the threads of
    one library go on spinning for a while when they are done, and would slow down the next library's, and what comes
    second of two alike would find the first one's memory warm.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            works[name]()
            since = time.perf_counter()
            works[name]()
            if repeat > 0:
                found[name].append(time.perf_counter() - since)
    return found


def _share(flops: float, seconds: list[float], flops_of_square: float, squares: list[float]) -> Row:
    """Return which share of the rate of the square product next to it each repeat reached."""
    pairs = zip(seconds, squares, strict=True)
    return {"share of the machine's rate": spread([flops / own * square / flops_of_square for own, square in pairs])}


def _median(seconds: list[float]) -> Row:
    return {"seconds": f"{statistics.median(seconds):.4g}", "range": f"{min(seconds):.4g} to {max(seconds):.4g}"}


def _rate(flops: float, seconds: list[float]) -> Row:
    return _median(seconds) | {"gflops": round(flops / statistics.median(seconds) / 1e9, 1)}


PARTS: dict[Part, Callable[[MatmulConfig], list[Row]]] = {
    "rate": rates,
    "grams": grams,
    "eigh": eigensolvers,
    "residual": residuals,
    "svd": decompositions,
    "step": steps,
}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
