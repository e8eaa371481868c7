"""KeepLoRA: low-rank updates confined to the residual subspace of the weights (arXiv 2601.19659).

The input directions that carry pre-trained knowledge (the principal subspace of each weight) and those that earlier
tasks used are protected. Each task's `a` is the top of its own gradient's residual, frozen; only `b` is trained, so
that no optimiser can leave the residual subspace. Where the authors' release departs from the paper, the paper is
followed; `features="batch_mean"` and `b_start="gradient"` bring the release's choices back for comparison.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keeplora.errors import LearningError
from keeplora.layers import lora
from keeplora.layers.input_covariance import SEEN, SeenInputs, Watched, grams_of, input_grams, pop_seen_inputs
from keeplora.layers.lora import alphas_for, warn_of_small_ranks
from keeplora.layers.module_state import device_of
from keeplora.layers.names import layer_scales, tower_share
from keeplora.layers.residual_gradients import RESIDUALS
from keeplora.methods.base import HEAD, Method, MethodConfig
from keeplora.methods.task_record import TaskRecord
from keeplora.progress import Track, silent
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace import protected as subspace
from keeplora.subspace.certificate import LEAK_ALLOWED, certificates, require_no_leak
from keeplora.task import Task


@dataclass(frozen=True, kw_only=True)
class KeepLoRAConfig(MethodConfig):
    """KeepLoRA's options; the defaults are the paper's for MTIL with CLIP ViT-B/16."""

    weight_energy: float | dict[str, float] = field(default_factory=lambda: {"vision": 0.85, "text": 0.2})
    """Share of each weight's energy that its principal subspace covers (eps_w): one value, or one for each tower, found
    by its name in the layer's."""
    feature_energy: float = 0.99
    """Share of each layer's input energy on a task that is protected after it (eps_f)."""
    gradient_share: float = 1.0
    """Share of the training batches that the gradient is taken from."""
    gradient: Literal["exact", "sketch"] = "exact"
    """`sketch` takes the leading directions of the gradient from two small random pictures of it, in place of the
    gradient itself: less memory where layers are wide."""
    b_start: Literal["zero", "gradient"] = "zero"
    """Start of B: zero with the weight untouched, or the residual gradient's factor with the weight reduced by it."""
    features: Literal["second_moment", "last_epoch", "batch_mean"] = "second_moment"
    """Statistic of the inputs: exact second moment; the same, collected in the last epoch of training, which saves a
    pass and is of slightly earlier weights; or the released code's average over batches."""
    weight_side: Literal["input", "output"] = "input"
    """Side of the weight whose singular vectors are its principal subspace: `output` is the released code's, for square
    layers only."""
    energy_rule: Literal["reach", "one_short"] = "reach"
    """Directions that are kept: the fewest that reach the share, or, as in the released code, one less for the weights
    and for the first task."""
    a_start: Literal["gradient", "random"] = "gradient"
    """Start of A: the top of the residual gradient, or random directions of the residual subspace (an ablation)."""
    a_training: Literal["frozen", "trained"] = "frozen"
    """`trained` lets the optimiser move A out of the residual subspace (an ablation); the certificate tells how far."""
    layer_scale: float = 1.0
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
        for name in ("feature_energy", "layer_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is a share; give a number from 0 to 1")
        if not 0 < self.gradient_share <= 1:
            raise ValueError(f"gradient_share = {self.gradient_share} is a share; give a number above 0, at most 1")
        if self.gradient == "sketch" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs the gradient itself; set gradient = 'exact'")
        if self.a_start == "random" and self.b_start == "gradient":
            raise ValueError("b_start = 'gradient' needs a_start = 'gradient'; set one of the two otherwise")


SIGNIFICANT = 1e-5
"""Singular values of the residual gradient below this share of the gradient's norm are rounding noise."""


class KeepLoRA(Method):
    """Learn each task orthogonally to what the model knows; `bases` holds what is protected, `[d_in, k]` a layer."""

    Config: ClassVar[type[MethodConfig]] = KeepLoRAConfig
    config: KeepLoRAConfig

    fixed: ClassVar[tuple[str, ...]] = ("targets", "weight_energy", "weight_side", "energy_rule", "a_training")

    def __init__(self, config: KeepLoRAConfig | None = None, *, seed: int = 0, track: Track = silent) -> None:
        super().__init__(config, seed=seed, track=track)
        self.bases: dict[str, Tensor] = {}
        self._num_learned = 0
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}
        self._surviving: dict[str, float] = {}

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return a stock PEFT LoRA model with `a` set from the task's residual gradient and frozen (Eq. 4 to 6).

        Raises:
            LearningError: If a gradient is not finite, or nothing is left to learn with.
            ValueError: If no layer matches the targets.
        """
        self._require_one_process()
        self.protect_principal(model)
        factors = self._unpack(self.once("initialise", lambda: self._start(model, task)), task)
        ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
        head = None
        if self.config.classifier == "cosine":
            head = task.load_head(self.once("head", lambda: dict(task.start_head(model).state_dict())))
        self.snapshot(model)
        adapted = lora.attach(model, ranks, self._alphas(ranks), factors=factors)
        if self.config.a_training == "trained":
            lora.thaw_a(adapted)
        if self.config.b_start == "gradient":
            self._take_start_out(adapted, factors)
        if head is not None:
            adapted.add_module(HEAD, head)
        return adapted

    def training_task(self, model: nn.Module, task: Task, epochs: int) -> Task:
        """Return the task; with `features="last_epoch"` one that looks at the layers' inputs in the last epoch."""
        if self.config.features != "last_epoch":
            return task
        seen = SeenInputs(task, {name: len(basis) for name, basis in self.bases.items()})
        model.add_module(SEEN, seen)
        layers = {name: lora.inner(model).get_submodule(name) for name in self.bases}
        return Watched(task, seen, layers, epochs)

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Merge the update, protect the task's dominant input directions (Eq. 8 to 10), and certify that none leaked.

        Raises:
            ValueError: If the update left the residual subspace, or the merge changed the outputs.
        """
        self._put_start_back(model)
        updates = lora.factors_of(model)
        require_no_leak(updates, self.bases, task.name, allowed=self.leak_allowed)
        saved = lora.detach(model)
        head = {name: value.detach().cpu().clone() for name, value in _head_state(model).items()}
        seen = pop_seen_inputs(model)
        merged, error = self.merge_checked(model, task)
        directions = self.once("features", lambda: self._new_directions(merged, task, seen))
        record = TaskRecord(
            adapter=saved,
            directions=directions,
            certificate=certificates(self.bases, subspace.extend_bases(self.bases, directions), updates),
            merge_error=error,
            head=head,
            surviving_gradient=self._surviving,
        )
        self.keep(record)
        return merged

    def add_task(self, record: TaskRecord) -> None:
        """Protect the directions that a task recorded."""
        self._num_learned += 1
        directions = {name: value.to(self.bases[name].device) for name, value in record.directions.items()}
        self.bases = subspace.extend_bases(self.bases, directions)

    def remove_task(self, record: TaskRecord) -> None:
        """Protect the directions that a task recorded no longer."""
        self.bases = subspace.remove_directions(self.bases, record.directions)
        self._num_learned -= 1

    def replay(self, model: nn.Module, record: TaskRecord, folder: Path) -> nn.Module:
        """Redo a finished task: merge its adapter and protect the directions it recorded."""
        self.protect_principal(model)
        return super().replay(model, record, folder)

    def protected(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the bases: before the first task, the principal subspace of each target weight."""
        self.protect_principal(model)
        return dict(self.bases)

    @property
    def leak_allowed(self) -> float:
        """The largest share of an update that may lie inside the bases; a trained `a` may go anywhere."""
        return LEAK_ALLOWED if self.config.a_training == "frozen" else 1.0

    def protect_principal(self, model: nn.Module) -> None:
        """Start the bases with the principal subspace of every target weight (Eq. 2), unless that was done."""
        if self.bases:
            return
        targets = lora.linear_targets(model, self.config.targets)
        weights = {name: self._seen_from_its_side(name, model.get_parameter(f"{name}.weight")) for name in targets}
        shares = {name: tower_share(name, self.config.weight_energy) for name in targets}
        self.bases = subspace.principal_bases(weights, shares)
        if self.config.energy_rule == "one_short":
            self.bases = subspace.without_last(self.bases)

    def _seen_from_its_side(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight so that its right singular vectors are those to protect."""
        if self.config.weight_side == "input":
            return weight.detach()
        if weight.shape[0] != weight.shape[1]:
            raise ValueError(
                f"weight_side = 'output' needs square layers, and {name!r} is {tuple(weight.shape)}; leave it out of"
                " targets, or set weight_side to 'input'"
            )
        return weight.detach().T

    def _start(self, model: nn.Module, task: Task) -> dict[str, Tensor]:
        """Return by layer the `.a` and `.b` of the start, and the share of the gradient that `.survives` (Eq. 4 to 6).

        Layers without room have no `.a`; the others' spans the top of the residual gradient.
        """
        rank, share, residuals = self.config.rank, self.config.gradient_share, RESIDUALS[self.config.gradient]
        gradients = self.once("gradient", lambda: residuals(model, task, self.bases, rank, share, self.track))
        generator = torch.Generator().manual_seed(self.seed + 1000 * self._num_learned)
        start = {}
        for name, basis in self.bases.items():
            residual, norm = gradients[f"{name}.residual"], float(gradients[f"{name}.norm"])
            start[f"{name}.survives"] = gradients[f"{name}.survives"]
            a = _leading_rows(residual, basis, self.config.rank, norm, self.seed)
            if self.config.a_start == "random":
                a = linalg.orthonormal_rows(_random_rows(a, generator), basis)
            if len(a) > 0:
                d_out, from_gradient = len(model.get_parameter(f"{name}.weight")), self.config.b_start == "gradient"
                start[f"{name}.a"] = a
                start[f"{name}.b"] = residual @ a.T if from_gradient else residual.new_zeros(d_out, len(a))
        return start

    def _unpack(self, start: dict[str, Tensor], task: Task) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `(a, b)` at the start for every layer with room, and say which ones have little or none."""
        self._surviving = {name: float(start[f"{name}.survives"]) for name in self.bases}
        factors = {name: (start[f"{name}.a"], start[f"{name}.b"]) for name in self.bases if f"{name}.a" in start}
        if not factors:
            raise LearningError(
                f"task {task.name!r}: no layer has a residual direction left to learn with; the protected subspaces"
                " are full, or no gradient reaches the targets. Lower weight_energy or feature_energy, or add targets"
            )
        ranks = {name: len(factors[name][0]) if name in factors else 0 for name in self.bases}
        warn_of_small_ranks(ranks, self.config.rank, task.name)
        return factors

    def _new_directions(self, merged: nn.Module, task: Task, seen: SeenInputs | None) -> dict[str, Tensor]:
        """Return the dominant directions of the task's inputs that no basis covers yet (Eq. 8 to 10)."""
        if self.config.features == "last_epoch":
            grams = grams_of(seen, task, device_of(merged))
        else:
            grams = input_grams(merged, task, list(self.bases), features=self.config.features, track=self.track)
        directions = subspace.new_directions(self.bases, grams, self.config.feature_energy)
        is_short = self.config.energy_rule == "one_short" and self._num_learned == 0
        return subspace.without_last(directions) if is_short else directions

    def _require_one_process(self) -> None:
        if not dist.is_initialized():
            return
        for option, value in (("features", "batch_mean"), ("classifier", "cosine")):
            if getattr(self.config, option) == value:
                raise ValueError(f"{option} = {value!r} works in one process only; run without a launcher")

    def _alphas(self, ranks: dict[str, int]) -> dict[str, float]:
        """Return each layer's alpha, so that alpha / rank is the same where a rank had to shrink."""
        scales = layer_scales(list(self.bases), self.config.layer_scale)
        alphas = alphas_for(ranks, self.config.alpha, self.config.rank)
        return {name: alpha * scales[name] for name, alpha in alphas.items()}

    def _take_start_out(self, adapted: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Reduce the weights by the start of the update, so that the function stays; keep them for later."""
        layers = lora.lora_layers(adapted)
        for name, (a, b) in factors.items():
            weight = layers[name].get_base_layer().weight
            self._starts[name] = (b, weight.detach().clone())
            lora.add_to_base(layers[name], -layers[name].scaling[lora.ADAPTER] * b @ a)

    def _put_start_back(self, adapted: nn.Module) -> None:
        """Give the weights back, bit by bit, and take the start out of `b`: the adapter is then the whole update."""
        layers = lora.lora_layers(adapted)
        for name, (b, weight) in self._starts.items():
            with torch.no_grad():
                layers[name].get_base_layer().weight.copy_(weight)
                layers[name].lora_B[lora.ADAPTER].weight.sub_(b)
        self._starts = {}


def _leading_rows(residual: Tensor, basis: Tensor, rank: int, norm: float, seed: int) -> Tensor:
    """Return the top input directions of a residual gradient as orthonormal rows, at most `rank`, perhaps none."""
    room = min(rank, basis.shape[0] - basis.shape[1], *residual.shape)
    if room == 0 or norm == 0 or not math.isfinite(norm):
        return residual.new_zeros(0, basis.shape[0])
    _, s, vh = linalg.low_rank(residual, room, seed=seed)
    return linalg.orthonormal_rows(vh[s > SIGNIFICANT * norm], basis)


def _random_rows(like: Tensor, generator: torch.Generator) -> Tensor:
    rows = torch.randn(like.shape, generator=generator).to(like)
    return nn.functional.normalize(rows, dim=1)


def _head_state(model: nn.Module) -> dict[str, Tensor]:
    head = getattr(model, HEAD, None)
    return {} if head is None else head.state_dict()
