"""What KeepLoRA would cost at the width of a 7B and of a 72B language model: computed on paper, nothing is run.

Prints the Markdown tables of docs/cost.md, from the sizes of the layers alone.

    python benchmarks/extrapolate.py
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import tyro

from keeplora.subspace.gradient_sketch import CORANGE, RANGE
from keeplora.subspace.linear_algebra import COMPLEMENT_FROM

BF16, FLOAT32 = 2, 4
"""Bytes of a number."""

DEVICES = (1, 8, 16)

EIGH = 9
"""An eigenproblem with all vectors takes about so many times d³ operations (Golub and Van Loan, symmetric QR)."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig:
    """What is assumed."""

    share: float = 0.3
    """Share of the input directions of every layer that are protected."""
    rank: int = 64
    """Rank of the updates."""
    tokens: int = 1_000_000
    """Tokens of a task, of the prompts and answers of all its examples."""
    rate: float = 100.0
    """Billions of operations a second that the eigensolver reaches."""


@dataclass(frozen=True)
class Decoder:
    """A language model of equal blocks, by its widths."""

    name: str
    blocks: int
    parameters: float
    hidden: int
    intermediate: int
    values: int

    def total(self, value: Callable[[int, int], float]) -> float:
        """Add up a function of `(d_out, d_in)` over the layers q, k, v, o, gate, up and down of all blocks."""
        h, i, v = self.hidden, self.intermediate, self.values
        return self.blocks * sum(value(*s) for s in ((h, h), (v, h), (v, h), (h, h), (i, h), (i, h), (h, i)))

    @property
    def gram(self) -> int:
        """Numbers in all grams: one for q, k and v, one for o, one for gate and up, one for down."""
        return self.blocks * (3 * self.hidden**2 + self.intermediate**2)


MODELS = (Decoder("7B", 32, 6.7e9, 4096, 11008, 4096), Decoder("72B", 80, 72.7e9, 8192, 29568, 8 * 128))
"""The language model of LLaVA-1.5-7B (Vicuna, a Llama), and one of the shape of Qwen2-72B."""


def main(config: tyro.conf.OmitArgPrefixes[ExtrapolateConfig]) -> None:
    """Print the tables."""
    print(report(config))


def report(config: ExtrapolateConfig) -> str:
    """Return the tables: bytes by model and number of devices, and operations."""
    names = [model.name for model in MODELS]
    of_bytes = {model.name: sizes(model, config) for model in MODELS}
    bytes_rows = [[what, *(f"{of_bytes[name][what] / 1e9:.3g}" for name in names)] for what in of_bytes[names[0]]]
    head = ["if split evenly, GB a device", *(f"{name}, {n}" for name in names for n in DEVICES)]
    of_work = {model.name: work(model, config) for model in MODELS}
    work_rows = [[what, *(of_work[name][what] for name in names)] for what in of_work[names[0]]]
    heads = ["whole model, GB", *names], head, ["work", *names]
    return "\n\n".join(map(_table, heads, (bytes_rows, list(split_rows(of_bytes)), work_rows)))


def sizes(model: Decoder, config: ExtrapolateConfig) -> dict[str, float]:
    """Return the bytes of everything that KeepLoRA keeps."""
    r, share = config.rank, config.share
    lora = model.total(lambda d_out, d_in: r * (d_out + d_in))
    return {
        "weights, bf16": BF16 * model.parameters,
        f"bases, {share:.0%} of the directions": FLOAT32 * model.total(lambda d_out, d_in: share * d_in**2),
        "gradient, exact": FLOAT32 * model.total(lambda d_out, d_in: d_out * d_in),
        "gradient, sketch": FLOAT32 * model.total(lambda d_out, d_in: sketched(d_out, d_in, r)),
        "grams": FLOAT32 * model.gram,
        "one gram of down": FLOAT32 * model.intermediate**2,
        f"A and B, rank {r}": FLOAT32 * lora,
        "gradient and AdamW states, B alone": 3 * FLOAT32 * model.total(lambda d_out, d_in: r * d_out),
        "the same for LoRA, A and B": 3 * FLOAT32 * lora,
    }


def sketched(d_out: int, d_in: int, rank: int) -> int:
    """Return how many numbers the sketch of a layer's gradient and its random maps are."""
    return sum(min(width * rank, d_out, d_in) for width in (RANGE, CORANGE)) * (d_in + d_out)


def split_rows(of_bytes: dict[str, dict[str, float]]) -> Iterable[list[str]]:
    """Yield what each phase holds at once, as one device of several would if all of it were split evenly."""
    for phase, picks in PHASES.items():
        totals = [sum(value for what, value in found.items() if what.startswith(picks)) for found in of_bytes.values()]
        yield [phase, *(f"{total / n / 1e9:.3g}" for total in totals for n in DEVICES)]


PHASES: dict[str, tuple[str, ...]] = {
    "plain LoRA, a step": ("weights", "A and B", "the same"),
    "KeepLoRA, a step": ("weights", "bases", "A and B", "gradient and"),
    "KeepLoRA, a step of the last epoch with features = last_epoch": (
        "weights",
        "bases",
        "A and B",
        "gradient and",
        "grams",
    ),
    "gradient, exact": ("weights", "bases", "gradient, exact"),
    "gradient, sketch": ("weights", "bases", "gradient, sketch"),
    "features": ("weights", "bases", "grams"),
}
"""What a phase holds, by the beginnings of the names in `sizes`; activations come on top."""


def work(model: Decoder, config: ExtrapolateConfig) -> dict[str, str]:
    """Return the operations of each phase beyond LoRA's, and the seconds of eigenproblems at the stated rate."""
    share, rank = config.share, config.rank
    forward = 2 * config.tokens * model.total(lambda d_out, d_in: d_out * d_in)
    grams = 2 * config.tokens * model.gram
    k = share  # In shares of d_in, as what is left for eigenproblems and products beside the basis.
    rest, beside = (1 - k, 1 - k) if k >= COMPLEMENT_FROM else (1, k)
    once = EIGH * model.total(lambda d_out, d_in: min(d_out, d_in) ** 3)
    update = EIGH * model.total(lambda d_out, d_in: (rest * d_in) ** 3)
    hours = config.rate * 3.6e12
    operations = {
        f"a forward pass over {config.tokens:,} tokens": forward,
        "gradient: forward and backward": 3 * forward,
        "features: grams, beside a forward pass": grams,
        "initialise: residual gradient": model.total(lambda d_out, d_in: 4 * k * d_out * d_in**2),
        "initialise: low-rank SVD": model.total(lambda d_out, d_in: 80 * rank * d_out * d_in),
        "update: grams of the complements": model.total(lambda d_out, d_in: (4 * k + 4 * beside * k) * d_in**3),
        "eigh, for the bases, once": once,
        "eigh, for every update": update,
    }
    return {f"{what}, PFLOP": f"{count / 1e15:.3g}" for what, count in operations.items()} | {
        f"eigh at {config.rate:g} GFLOP/s, once, hours": f"{once / hours:.2g}",
        f"eigh at {config.rate:g} GFLOP/s, for every update, hours": f"{update / hours:.2g}",
        "share of down in it": f"{EIGH * model.blocks * (rest * model.intermediate) ** 3 / update:.0%}",
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
