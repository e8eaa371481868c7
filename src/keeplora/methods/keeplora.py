"""KeepLoRA: low-rank updates confined to the residual subspace of the weights (arXiv 2601.19659).

The input directions that carry pre-trained knowledge (the principal subspace of each weight) and those that earlier
tasks used are protected. Each task's `a` is the top of its own gradient's residual, frozen; only `b` is trained, so
that no optimiser can leave the residual subspace. Where the authors' release departs from the paper, the paper is
followed; `features="batch_mean"` and `b_start="gradient"` bring the release's choices back for comparison.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from keeplora.config import Share
from keeplora.layers import lora, weights
from keeplora.layers.gradients import RESIDUALS, ResidualGradients
from keeplora.layers.input_covariance import SEEN, SeenInputs, Watched, grams_of, input_grams
from keeplora.layers.module_state import device_of
from keeplora.layers.names import layer_scales, tower_share
from keeplora.methods.base import ABLATION, MethodConfig, Step
from keeplora.methods.protecting import Initialisation, Protecting
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace import protected
from keeplora.task import Task

SIGNIFICANT = 1e-5
"""Singular values of the residual gradient below this share of the gradient's norm are rounding noise."""


@dataclass(frozen=True, kw_only=True)
class KeepLoRAConfig(MethodConfig):
    """KeepLoRA's options; the defaults are the paper's for MTIL with CLIP ViT-B/16."""

    weight_energy: float | dict[str, float] = field(default_factory=lambda: {"vision": 0.85, "text": 0.2, "other": 0.6})
    """Share of each weight's energy that its principal subspace covers (eps_w): one value, or one for each tower, found
    by its name in the layer's, and `other` for layers of no tower: in a language model, 0.6 as in the paper."""
    feature_energy: Share = 0.99
    """Share of each layer's input energy on a task that is protected after it (eps_f)."""
    gradient_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training batches that the gradient is taken from."""
    gradient: Literal["exact", "sketch"] = "exact"
    """`sketch` takes the leading directions of the gradient from two small random pictures of it, in place of the
    gradient itself: less memory where layers are wide."""
    b_start: Literal["zero", "gradient"] = field(default="zero", metadata=ABLATION)
    """Start of B: zero with the weight untouched, or the residual gradient's factor with the weight reduced by it."""
    features: Literal["second_moment", "last_epoch", "batch_mean"] = "second_moment"
    """Statistic of the inputs: exact second moment; the same, collected in the last epoch of training, which saves a
    pass and is of slightly earlier weights; or the released code's average over batches."""
    weight_side: Literal["input", "output"] = field(default="input", metadata=ABLATION)
    """Side of the weight whose singular vectors are its principal subspace: `output` is the released code's, for square
    layers only."""
    energy_rule: Literal["reach", "one_short"] = field(default="reach", metadata=ABLATION)
    """Directions that are kept: the fewest that reach the share, or, as in the released code, one less (but never none)
    in the first call for a layer, which is that for its weight where `weight_energy` is above 0."""
    a_start: Literal["gradient", "random"] = field(default="gradient", metadata=ABLATION)
    """Start of A: the top of the residual gradient, or random directions of the residual subspace (an ablation)."""
    a_training: Literal["frozen", "trained"] = field(default="frozen", metadata=ABLATION)
    """`trained` lets the optimiser move A out of the residual subspace (an ablation); the certificate tells how far."""
    layer_scale: Share = 1.0
    """KeepLoRA++: factor of the first block's update, growing linearly to 1 at the last."""
    classifier: Literal["none", "cosine"] = "none"
    """KeepLoRA+: `cosine` adds each learned task a cosine classifier on the image features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        energies = self.weight_energy if isinstance(self.weight_energy, Mapping) else {"": self.weight_energy}
        for tower, energy in energies.items():
            if not 0 <= energy <= 1:
                where = f" for {tower!r}" if tower else ""
                raise ValueError(f"weight_energy{where} = {energy} is a share; give a number from 0 to 1")
        if self.feature_energy == 1:
            flaw = "protects all that the first task's inputs reach, and leaves nothing to learn with"
            raise ValueError(f"feature_energy = 1.0 {flaw}; give less, such as 0.99")
        if self.gradient == "sketch" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs the gradient itself; set gradient = 'exact'")
        if self.a_start == "random" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs a_start = 'gradient'; set one of the two otherwise")


class KeepLoRA(Protecting):
    """Learn each task orthogonally to what the model knows and to what earlier tasks used, which the bases cover."""

    Config: ClassVar[type[MethodConfig]] = KeepLoRAConfig
    config: KeepLoRAConfig

    steps: ClassVar[tuple[Step, ...]] = (
        Step("gradient", ResidualGradients),
        Step("initialise", Initialisation, supersedes="gradient"),
        Step("head"),
        Step("features"),
    )
    fixed: ClassVar[tuple[str, ...]] = (
        *Protecting.fixed,
        "weight_energy",
        "weight_side",
        "energy_rule",
        "a_training",
    )

    def start(self) -> None:
        super().start()
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        self._seen: SeenInputs | None = None

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model with `a` set from the task's residual gradient and frozen (Eq. 4 to 6)."""
        for option, value in (("features", "batch_mean"), ("classifier", "cosine")):
            if dist.is_initialized() and getattr(self.config, option) == value:
                raise ValueError(f"{option} = {value!r} works in one process only; run without a launcher")
        adapted = super().before_task(model, task)
        if self.config.a_training == "trained":
            lora.thaw_a(adapted)
        if self.config.b_start == "gradient":
            self._take_start_out()
        return adapted

    def training_task(self, model: nn.Module, task: Task, epochs: int) -> Task:
        """Return the task; with `features="last_epoch"` one that looks at the layers' inputs in the last epoch."""
        if self.config.features != "last_epoch":
            return task
        task = Task.of(task)
        seen = SeenInputs(task, {name: len(basis) for name, basis in self.bases.items()})
        model.add_module(SEEN, seen)
        layers = {name: lora.inner(model).get_submodule(name) for name in self.bases}
        return Watched(task, seen, layers, epochs)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge the update, protect the task's dominant input directions (Eq. 8 to 10), certify that none leaked."""
        self._put_start_back()
        self._seen = cast(SeenInputs | None, model._modules.pop(SEEN, None))
        return super().after_task(model, task)

    def abandon(self, adapted: nn.Module) -> nn.Module:
        self._put_start_back()
        return super().abandon(adapted)

    def gradient(self, model: nn.Module, task: Task) -> ResidualGradients:
        """Return what of the gradient on a task lies outside the bases."""
        residuals, rank = RESIDUALS[self.config.gradient], self.config.rank
        return residuals(model, task, self.bases, rank, self.config.gradient_share, self.track)

    def initialise(self, model: nn.Module, task: Task) -> Initialisation:
        gradients = self.gradient(model, task)
        generator = torch.Generator().manual_seed(self.seed + 1000 * self._num_learned)
        start = Initialisation({}, {}, gradients.surviving)
        for name, basis in self.bases.items():
            rows = gradients.rows[name]
            a = _leading_rows(rows, basis, self.config.rank, gradients.norms[name], self.seed)
            if self.config.a_start == "random":
                random = torch.randn(a.shape, generator=generator).to(a)
                a = linalg.orthonormal_rows(nn.functional.normalize(random, dim=1), basis)
            if len(a) > 0:
                d_out, from_gradient = weights.shape_of(model, name)[0], self.config.b_start == "gradient"
                start.a[name] = a
                start.b[name] = rows @ a.T if from_gradient else rows.new_zeros(d_out, len(a))
        return start

    def head(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the start of the task's own classifier."""
        return dict(Task.of(task).start_head(model).state_dict())

    def new_head(self, model: nn.Module, task: Task) -> nn.Module | None:
        return Task.of(task).load_head(self.head(model, task)) if self.config.classifier == "cosine" else None

    def scales(self) -> dict[str, float]:
        """Return the factor of each layer's update (KeepLoRA++)."""
        return layer_scales(list(self.bases), self.config.layer_scale)

    def features(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return the dominant directions of the task's inputs that no basis covers yet (Eq. 8 to 10)."""
        if self.config.features == "last_epoch":
            grams = grams_of(self._seen, task, device_of(model))
        else:
            grams = input_grams(model, task, list(self.bases), features=self.config.features, track=self.track)
        directions = protected.new_directions(self.bases, grams, self.config.feature_energy)
        if self.config.energy_rule == "one_short" and self._num_learned == 0:
            first = [name for name in directions if tower_share(name, self.config.weight_energy) == 0]
            directions |= protected.one_short({name: directions[name] for name in first})
        return directions

    def protect(self, model: nn.Module) -> None:
        """Start the bases with the principal subspace of every target weight (Eq. 2), unless that was done."""
        if self.bases:
            return
        targets = lora.linear_targets(model, self.config.targets, self.config.towers)
        bases: dict[str, Tensor] = {}
        for name in targets:  # One by one: whole weights in float32 would be a second model.
            seen = {name: self._seen_from_its_side(name, weights.read_weight(model, name))}
            bases |= protected.principal_bases(seen, {name: tower_share(name, self.config.weight_energy)})
        self.bases = protected.one_short(bases) if self.config.energy_rule == "one_short" else bases

    @property
    def leak_allowed(self) -> float:
        return super().leak_allowed if self.config.a_training == "frozen" else 1.0  # A trained `a` may go anywhere.

    def _seen_from_its_side(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight so that its right singular vectors are those to protect."""
        if self.config.weight_side == "input":
            return weight
        if weight.shape[0] != weight.shape[1]:
            raise ValueError(
                f"weight_side = 'output' needs square layers, and {name!r} is {tuple(weight.shape)}; leave it out of"
                " targets, or set weight_side to 'input'"
            )
        return weight.T

    def _take_start_out(self) -> None:
        """Reduce the weights by the start of the update, so that the function stays; keep them for later."""
        for name, layer in self.layers.items():
            a, b, weight = layer.lora_A[lora.ADAPTER].weight, layer.lora_B[lora.ADAPTER].weight, layer.base_layer.weight
            self._starts[name] = (b.detach().clone(), weight.detach().clone())
            with torch.no_grad():
                weight.sub_((layer.scaling[lora.ADAPTER] * b @ a).to(weight.dtype))

    def _put_start_back(self) -> None:
        """Give the weights back, bit by bit, and take the start out of `b`: the adapter is then the whole update."""
        with torch.no_grad():
            for name, (b, weight) in self._starts.items():
                self.layers[name].base_layer.weight.copy_(weight)
                self.layers[name].lora_B[lora.ADAPTER].weight.sub_(b)
        self._starts = {}


def _leading_rows(residual: Tensor, basis: Tensor, rank: int, norm: float, seed: int) -> Tensor:
    """Return the top input directions of a residual gradient as orthonormal rows, at most `rank`, perhaps none."""
    most = min(rank, basis.shape[0] - basis.shape[1], *residual.shape)
    if most == 0 or norm == 0 or not math.isfinite(norm):
        return residual.new_zeros(0, basis.shape[0])
    _, s, vh = linalg.low_rank(residual, most, seed=seed)
    return linalg.orthonormal_rows(vh[s > SIGNIFICANT * norm], basis)
