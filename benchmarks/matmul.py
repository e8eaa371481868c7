"""Measure how near the library comes to what the machine can do.

The rate of float32 matrix products (square ones, and the tall ones of `collect`), the share of it that the accumulation
of input grams and a training step reach, and the library's eigensolver against those of numpy and scipy.

    python benchmarks/matmul.py --parts rate grams eigh --widths 512 768 1024
    python benchmarks/matmul.py --parts step --workload vit_b16 --images 64
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.linalg
import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from keeplora import collect, linalg
from keeplora.adapter import linear_targets
from keeplora.methods import KeepLoRA, LoRAFT, Method
from keeplora.train import TrainConfig, fit
from phases import machine
from workloads import WorkloadConfig, load

Part = Literal["rate", "grams", "eigh", "step"]


@dataclass(frozen=True, kw_only=True)
class MatmulConfig(WorkloadConfig):
    """What to measure."""

    parts: tuple[Part, ...] = ("rate", "grams", "eigh")
    """rate: matrix products; grams: the accumulation of input grams; eigh: eigensolvers; step: a training step of the
    workload by lora_ft and by keeplora."""
    sides: tuple[int, ...] = (2048, 4096)
    """Sides of the square matrices whose product gives the machine's rate: the best one counts."""
    widths: tuple[int, ...] = (512, 768, 1024, 2048, 4096)
    """d_in of the grams and the eigenproblems; grams only from 768 on."""
    rows: int = 12608
    """Rows of a batch: 64 images of 197 tokens."""
    repeats: int = 5
    """How often each is measured."""
    limit: float = 60.0
    """Leave a solver out at a width where it would take more seconds, by what it took at a smaller one."""
    output: Path = Path("runs/benchmarks/matmul.json")
    """File for the results."""


def main(config: tyro.conf.OmitArgPrefixes[MatmulConfig]) -> None:
    """Measure, write the results as JSON, and print them as Markdown."""
    results: dict[str, list[dict[str, Any]]] = {}
    best = 0.0
    for part in ("rate", *(part for part in config.parts if part != "rate")):
        results[part] = PARTS[part](config, best)
        if part == "rate":
            best = max(row["gflops"] for row in results[part])
        print(f"{part}\n\n{table(results[part])}\n", flush=True)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


def rates(config: MatmulConfig, best: float) -> list[dict[str, Any]]:
    """Measure square matrix products."""
    rows = []
    for side in config.sides:
        x, y, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
        seconds = _seconds(lambda x=x, y=y, out=out: torch.mm(x, y, out=out), config.repeats)
        rows.append({"product": f"square {side}"} | _rate(2 * side**3, seconds))
    return rows


def grams(config: MatmulConfig, best: float) -> list[dict[str, Any]]:
    """Measure what `input_grams` does with the rows of a batch, and plain products of the same shape.

    Products are counted as 2 * rows * d_in ** 2, though a gram is symmetric: `syrk`, which computes one half only,
    may so pass the machine's rate.
    """
    found = []
    for width in (width for width in config.widths if width >= 768):
        for name, (count, work) in accumulations(config.rows, width).items():
            rate = _rate(2 * count * width**2, _seconds(work, config.repeats))
            found.append({"d_in": width, "what": name} | rate | {"share": round(rate["gflops"] / best, 3)})
    return found


def accumulations(num_rows: int, width: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return ways to add rows to a gram by name: how many rows it counts, and the work."""
    rows, total = torch.randn(num_rows, width), torch.zeros(width, width)
    inputs = rows.unsqueeze(0)
    real = torch.rand(inputs.shape[:-1]) < 0.9
    halves, in_numpy = inputs.bfloat16(), rows.numpy().T
    whole, masked, half = (collect.STATISTICS["second_moment"]() for _ in range(3))
    return {
        "mm": (num_rows, lambda: torch.mm(rows.T, rows, out=total)),
        "addmm_ in place": (num_rows, lambda: total.addmm_(rows.T, rows)),
        "syrk of scipy, one half": (num_rows, lambda: scipy.linalg.blas.ssyrk(1.0, in_numpy)),
        "collect": (num_rows, lambda: whole.add(inputs, None)),
        "collect, padding left out": (int(real.sum()), lambda: masked.add(inputs, real)),
        "collect, bfloat16 inputs": (num_rows, lambda: half.add(halves, None)),
    }


def eigensolvers(config: MatmulConfig, best: float) -> list[dict[str, Any]]:
    """Measure all eigenvalues and eigenvectors of the same float32 gram by every solver."""
    found: list[dict[str, Any]] = []
    last: dict[str, tuple[int, float]] = {}
    for width in config.widths:
        rows = torch.randn(2 * width, width) * 0.99 ** torch.arange(width)
        gram = rows.T @ rows
        for name, solve in solvers(gram).items():
            if name in last and last[name][1] * (width / last[name][0]) ** 3 > config.limit:
                found.append({"d_in": width, "solver": name, "seconds": "left out", "range": ""})
                continue
            seconds = _seconds(solve, config.repeats)
            last[name] = (width, statistics.median(seconds))
            found.append({"d_in": width, "solver": name} | _median(seconds))
    return found


def solvers(gram: Tensor) -> dict[str, Callable[[], object]]:
    """Return the eigensolvers by name."""
    array = gram.numpy()
    width = len(array)
    found: dict[str, Callable[[], object]] = {
        "keeplora.linalg.spectrum": lambda: linalg.spectrum(gram),
        "torch.linalg.eigh": lambda: torch.linalg.eigh(gram),
        "numpy.linalg.eigh": lambda: np.linalg.eigh(array),
    }
    for driver in ("ev", "evd", "evr", "evx"):
        found[f"scipy {driver}"] = lambda driver=driver: scipy.linalg.eigh(array, driver=driver, check_finite=False)
    top = [width - width // 4, width - 1]
    found["scipy evr, top quarter"] = lambda: scipy.linalg.eigh(array, driver="evr", subset_by_index=top)
    return found


def steps(config: MatmulConfig, best: float) -> list[dict[str, Any]]:
    """Measure a training step; its products are counted as those that torch's own operations stand for."""
    found = []
    for name in ("lora_ft", "keeplora"):
        seconds = []
        for _ in range(config.repeats):
            workload = load(config)
            adapted = _method(name, workload.options).before_task(workload.model, workload.task)
            number = sum(1 for _ in workload.task.batches())
            if not seconds:
                batch = next(iter(workload.task.batches()))
                with FlopCounterMode(display=False) as counter:
                    workload.task.loss(adapted, batch).backward()
                adapted.zero_grad()
            since = time.perf_counter()
            fit(adapted, workload.task, TrainConfig(epochs=1, batch_size=config.batch_size))
            seconds.append((time.perf_counter() - since) / number)
        rate = _rate(counter.get_total_flops(), seconds)
        gflop = round(counter.get_total_flops() / 1e9, 1)
        found.append({"step of": name, "GFLOP": gflop} | rate | {"share": round(rate["gflops"] / best, 3)})
    return found


def _method(name: str, options: Any) -> Method:
    """Return the method; keeplora's protects nothing here and starts from a random gradient, as quick to train."""
    if name == "lora_ft":
        return LoRAFT(LoRAFT.Config(rank=options.rank, alpha=options.alpha, targets=options.targets))
    return _Unprotected(options)


class _Unprotected(KeepLoRA):
    """KeepLoRA without a principal subspace and without a gradient pass: what it trains is of the same size."""

    def protect_principal(self, model: torch.nn.Module) -> None:
        """Protect nothing."""
        names = linear_targets(model, self.config.targets)
        weights = {name: model.get_parameter(f"{name}.weight") for name in names}
        self.bases = {name: weight.new_zeros(weight.shape[1], 0) for name, weight in weights.items()}
        random = {name: torch.randn_like(weight) for name, weight in weights.items()}
        self.once = lambda name, compute: random if name == "gradient" else compute()


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows)])


def _seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each repeat, after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        since = time.perf_counter()
        work()
        found.append(time.perf_counter() - since)
    return found


def _median(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": f"{statistics.median(seconds):.4g}", "range": f"{min(seconds):.4g} to {max(seconds):.4g}"}


def _rate(flops: float, seconds: list[float]) -> dict[str, Any]:
    return _median(seconds) | {"gflops": round(flops / statistics.median(seconds) / 1e9, 1)}


PARTS: dict[str, Callable[[MatmulConfig, float], list[dict[str, Any]]]] = {
    "rate": rates,
    "grams": grams,
    "eigh": eigensolvers,
    "step": steps,
}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
