"""What the principal and the residual directions of the weights know: zero-shot accuracy without training.

The target weights are rebuilt from the fewest input directions that hold a share of their energy (eps_w in Eq. 2 of
arXiv 2601.19659, whose Figure 1 draws that curve), or from the other ones.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import matplotlib
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn

from keeplora.config import Config, Share
from keeplora.evaluation.evaluate import evaluate, plain
from keeplora.layers.lora import linear_targets
from keeplora.layers.names import in_tower
from keeplora.layers.weights import other_weights
from keeplora.methods.base import MethodConfig
from keeplora.models.interfaces import StreamTask
from keeplora.progress import Track, silent
from keeplora.report.charts import png
from keeplora.runs.atomic_store import write_atomically, write_json
from keeplora.runs.open import load_stream
from keeplora.subspace import linear_algebra as linalg

Names = Annotated[tuple[str, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class PrincipalConfig(Config):
    """Score a model whose weights keep only principal, or only residual, directions (Figure 1 of the paper)."""

    model: str = "mini"
    """The embedded model, a hub name, or a folder, such as RUN/model of a run."""
    benchmark: str = "mini"
    """Name of a benchmark, or path of its TOML file."""
    output: Path = Path("runs/principal")
    """Folder of principal.json and principal.png."""
    split: Literal["test", "validation"] = "test"
    """The examples to score on."""
    shares: Annotated[tuple[Share, ...], Field(min_length=1)] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0,
    )  # fmt: skip
    """Shares of each weight's energy that its principal directions hold, from 0 to 1, in any order."""
    towers: Names = ("vision", "text")
    """The towers whose weights are rebuilt, found by their names in the layers'; the others stay as they are."""
    targets: Names = MethodConfig.targets
    """Names, or ends of names, of the linear layers to rebuild."""


@dataclass(frozen=True)
class Point:
    """The scores of every task, in percent, with only the principal, and only the other, directions for a share."""

    share: float
    width: float  # Principal directions as part of the layer's width (`p / d_in`), mean over the layers.
    principal: list[float]
    residual: list[float]


@dataclass(frozen=True)
class PrincipalCurve:
    """What `principal.json` holds."""

    config: PrincipalConfig
    tasks: list[str]
    layers: list[str]  # The layers that were rebuilt.
    untouched: list[float]
    chance: list[float]  # The score of a guess, `100 / num_classes`, for each task.
    points: list[Point]

    @property
    def title(self) -> str:
        """What was scored on what, in a line."""
        config = self.config
        return f"{Path(config.model).name} on {Path(config.benchmark).stem} ({config.split}): zero-shot accuracy"

    def to_json(self) -> dict[str, object]:
        """Return the keys of `principal.json` in their order; each kind of score as its mean and for every task."""
        settings = {key: value for key, value in asdict(self.config).items() if key not in ("output", "shares")}
        points = [
            asdict(point) | {"principal": _summary(point.principal), "residual": _summary(point.residual)}
            for point in self.points
        ]
        scores = {"untouched": _summary(self.untouched), "chance": _summary(self.chance), "points": points}
        return {**settings, "layers": self.layers, "tasks": self.tasks, **scores}


def _summary(scores: list[float]) -> dict[str, float | list[float]]:
    return {"mean": fmean(scores), "tasks": scores}


def analyze_principal(config: PrincipalConfig, *, track: Track = silent) -> PrincipalCurve:
    """Score a model on a benchmark over the shares, and write `principal.json` and `principal.png` to the output."""
    config.output.mkdir(parents=True, exist_ok=True)
    model, tasks = load_stream(config.model, config.benchmark, evaluation=config.split, track=track)
    curve = principal_curve(model, tasks, config, track=track)
    write_json(config.output / "principal.json", curve.to_json())
    write_atomically(config.output / "principal.png", draw(curve))
    return curve


def principal_curve(
    model: nn.Module, tasks: list[StreamTask], config: PrincipalConfig, *, track: Track = silent
) -> PrincipalCurve:
    """Score a model with rebuilt weights over the shares, then restore them; ValueError: wrong targets or towers."""
    layers = _layers_to_rebuild(model, config)
    weights = {name: model.get_parameter(f"{name}.weight").detach().float() for name in layers}
    untouched = evaluate(model, tasks, track=track)
    spectra = {name: principal_spectrum(weights[name]) for name in track(layers, "directions", len(layers))}
    points = []
    for share in track(sorted(set(config.shares)), "shares of the energy", len(set(config.shares))):
        bases = {name: basis[:, : linalg.energy_rank(energies, share)] for name, (energies, basis) in spectra.items()}
        scores = []
        for part in (linalg.project_onto, linalg.project_out):
            with other_weights(model, {name: part(weights[name], bases[name]) for name in layers}):
                scores.append(evaluate(model, tasks, track=track))
        width = fmean(basis.shape[1] / basis.shape[0] for basis in bases.values())
        points.append(Point(share, width, *scores))
    # Every class has examples in every split.
    labels = [{label for batch in task.test_batches() for label in plain(task.references(batch))} for task in tasks]
    chance = [100.0 / len(known) for known in labels]
    return PrincipalCurve(config, [task.name for task in tasks], layers, untouched, chance, points)


def _layers_to_rebuild(model: nn.Module, config: PrincipalConfig) -> list[str]:
    targets = linear_targets(model, config.targets)
    for tower in config.towers:
        if not any(in_tower(name, tower) for name in targets):
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in targets))
            raise ValueError(f"no target layer is in the tower {tower!r}; the targets are in {tops}: set towers so")
    names = [name for name in targets if any(in_tower(name, tower) for tower in config.towers)]
    for name in names:
        if not torch.isfinite(model.get_parameter(f"{name}.weight")).all():
            raise ValueError(f"the weight of layer {name!r} is not finite; get the model anew")
    return names


def principal_spectrum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's energies `[n]`, largest first, and input directions `[d_in, n]`; `n = min(d_out, d_in)`."""
    energies, directions = linalg.spectrum(weight.T @ weight)
    n = min(weight.shape)
    return energies[:n], directions[:, :n]


def draw(curve: PrincipalCurve) -> bytes:
    """Draw the mean accuracy with either kind of directions over the share of the energy; return a PNG."""
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained", dpi=110)
        axis = figure.subplots()
        shares = [point.share for point in curve.points]
        axis.plot(shares, [fmean(point.principal) for point in curve.points], "o-", label="principal directions only")
        axis.plot(shares, [fmean(point.residual) for point in curve.points], "s-", label="residual directions only")
        axis.axhline(fmean(curve.untouched), ls="--", color="black", lw=1, label="untouched model")
        axis.axhline(fmean(curve.chance), ls="--", color="gray", lw=1, label="chance")
        axis.set(title=curve.title, xlim=(-0.02, 1.02), ylim=(0, None))
        axis.set(xlabel="share of the weights' energy in the principal directions", ylabel="mean accuracy in %")
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8)
        return png(figure)
