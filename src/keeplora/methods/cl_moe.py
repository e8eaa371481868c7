"""CL-MoE: a mixture of LoRA experts with two routers and momentum between tasks (arXiv 2503.00413, CVPR 2025).

Every target layer has n LoRA experts E_i, weighed as the paper's Dual-Router MoE does,

    beta * alpha/r * sum_i G^I(x)_i E_i(x) + (1 - beta) * alpha/r * sum_i G^T(t)_i E_i(x):

G^I the softmax of a linear map of the layer's input, G^T(t) the average of G^I over task t, frozen when t ends. Dynamic
Momentum MoE then sets theta_t = lambda * theta_{t-1} + (1 - lambda) * phi_t expert by expert, phi_t being what was
trained. Nothing is merged: the experts lie beside the base model, as hooks. At inference each tower takes the task
whose mean input of the first adapted layer is closest. docs/methods.md tells what differs from the release.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from keeplora.config import PositiveNumber, Share
from keeplora.errors import LearningError
from keeplora.layers import lora
from keeplora.layers.module_state import device_of
from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.task import Task


class Router(nn.Module):
    """Weighs the n experts of one layer for each row of its input; a frozen one does not learn from what it sees.

    `weight [n, d_in]` is the instance router's map, `tasks [t, n + d_in]` routers and mean inputs of finished tasks.
    """

    tasks: Tensor

    def __init__(self, weight: Tensor, tasks: Tensor, share: float, tower: "Tower | None" = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.share = share
        self.tower = tower or Tower()
        self.register_buffer("tasks", tasks)
        # Of instances, of their routing, of their inputs. No buffer: DDP would put one process's in the others' place.
        self.sums = torch.zeros(1 + sum(weight.shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the weights `[..., n]` for inputs `[..., d_in]`; they sum to one over the experts."""
        inputs = inputs.to(self.weight.dtype)
        instance = F.linear(inputs, self.weight).softmax(-1, self.weight.dtype)
        if self.weight.requires_grad and torch.is_grad_enabled():
            rows = torch.cat([_over_positions(instance.detach()), _over_positions(inputs.detach())], dim=1)
            self.sums = self.sums.to(rows.device) + torch.cat([rows.new_full((1,), len(rows)), rows.sum(0)])
            task = self.sums[1 : 1 + len(self.weight)] / self.sums[0]
        else:
            task = self._nearest_task(inputs, instance)
        return torch.lerp(task, instance, self.share)

    def get_extra_state(self) -> Tensor:
        return self.sums

    def set_extra_state(self, state: Tensor) -> None:
        self.sums = state

    def scale(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """Weigh the activations `[..., n * r]` of all experts' `a`: a forward hook of the stacked factor."""
        weights = self(args[0]).to(output.dtype)
        return torch.flatten(output.unflatten(-1, (len(self.weight), -1)) * weights.unsqueeze(-1), -2)

    def known_tasks(self) -> Tensor:
        """Return the routers and mean inputs of the finished tasks and of the one in training, `[t, n + d_in]`."""
        if not self.weight.requires_grad or self.sums[0] == 0:
            return self.tasks
        return torch.cat([self.tasks, (self.sums[1:] / self.sums[0]).unsqueeze(0)])

    def _nearest_task(self, inputs: Tensor, instance: Tensor) -> Tensor:
        routers, keys = self.known_tasks().split(list(self.weight.shape), dim=1)
        if len(routers) == 0:
            return instance
        nearest = self.tower.nearest(self, inputs, keys)
        return F.embedding(nearest, routers).reshape(len(inputs), *[1] * (inputs.dim() - 2), -1)


class Tower:
    """The task of each instance of one tower, found by its first router: no expert changes what that one reads."""

    def __init__(self) -> None:
        self.first: Router | None = None
        self.found = torch.zeros(0, dtype=torch.long)

    def nearest(self, router: Router, inputs: Tensor, keys: Tensor) -> Tensor:
        """Return for each instance the place of the key `[t, d_in]` that is nearest to the first router's input."""
        self.first = self.first or router
        if router is self.first:
            self.found = torch.cdist(_over_positions(inputs), keys).argmin(-1)
        return self.found


def add_experts(router: Router, a: Tensor, b: Tensor, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Add the routed update of `a [n * r, d_in]` and `b [d_out, n * r]` to a layer's output: a forward hook."""
    inputs, device = args[0].to(a.dtype), output.device
    routed = router.to(device).scale(layer, (inputs,), F.linear(inputs, a.to(device)))
    return (output + F.linear(routed, b.to(device))).to(output.dtype)


def _over_positions(rows: Tensor) -> Tensor:
    """Average over all but the first and the last dimension, `[batch, d]`."""
    return rows.flatten(1, -2).mean(1) if rows.dim() > 2 else rows


@dataclass(frozen=True, kw_only=True)
class CLMoEConfig(MethodConfig):
    """CL-MoE's options; the defaults are the authors' for LLaVA: 8 experts share rank 64, and alpha / rank is 2."""

    rank: PositiveInt = 8
    """Rank of each expert's update."""
    alpha: PositiveNumber = 16.0
    """LoRA's alpha; the update of an expert is alpha / rank * B A."""
    num_experts: PositiveInt = 8
    """Number of experts of a layer (n)."""
    instance_share: Share = 0.5
    """Share of the instance router in the weights of the experts; the task router has the rest (beta)."""
    momentum: Share = 0.7
    """What an expert keeps of its earlier self after a task, unless it is specific to that task (gamma)."""
    top_experts: PositiveInt = 2
    """How many experts of a layer are a task's own: those that its router weighs most (K)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_experts > self.num_experts:
            raise ValueError(f"top_experts = {self.top_experts} must be from 1 to num_experts = {self.num_experts}")


class CLMoE(Method):
    """Route each input among LoRA experts that stay beside the base model, and mix old and new experts after a task."""

    Config: ClassVar[type[MethodConfig]] = CLMoEConfig
    config: CLMoEConfig

    stands_alone: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = (*Method.fixed, "rank", "alpha", "num_experts")

    def start(self) -> None:
        self._experts: dict[str, tuple[Tensor, Tensor]] = {}
        self._routing: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def before_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Return one stock PEFT LoRA a layer, of rank n * r, that holds all experts, with a router in each."""
        targets = self.targets_of(model)
        while self._handles:
            self._handles.pop().remove()
        n, device, scaling = self.config.num_experts, device_of(model), self.config.alpha / self.config.rank
        factors = {name: (a.to(device), b.to(device) / scaling) for name, (a, b) in self._experts.items()}
        adapted = self.attach(model, dict.fromkeys(targets, n * self.config.rank), factors=factors)
        lora.thaw_a(adapted)
        towers: dict[str, Tower] = defaultdict(Tower)
        routers = [self._router(name, layer.in_features, towers).to(device) for name, layer in self.layers.items()]
        for layer, router in zip(self.layers.values(), routers, strict=True):
            layer.lora_A[lora.ADAPTER].register_forward_hook(router.scale)
        adapted.add_module("lora_routers", nn.ModuleList(routers))
        return adapted

    def after_task(self, model: nn.Module, task: Task) -> nn.Module:
        """Freeze the task's router, mix the experts with their earlier selves, and leave them beside the base model."""
        self.require_untouched(model, task)
        routers = cast(list[Router], model.get_submodule("lora_routers"))
        state: dict[str, Tensor] = {}
        for name, router in zip(self.layers, routers, strict=True):
            if dist.is_initialized():
                dist.all_reduce(router.sums)
            state[f"{name}.router"] = router.weight.detach().cpu().clone()
            state[f"{name}.tasks"] = router.known_tasks().cpu()
        self._mix(model, state, task)
        saved = lora.detach(model)
        base = self.restore(lora.unload(model))
        self.keep(TaskRecord(adapter=saved, state=state, merged=False))
        self._put_beside(base)
        return base

    def abandon(self, adapted: nn.Module) -> nn.Module:
        base = super().abandon(adapted)
        self._put_beside(base)
        return base

    def add_task(self, record: TaskRecord) -> None:
        assert record.adapter is not None, "CL-MoE always leaves its experts behind"
        self._experts, self._routing = record.adapter.factors(), record.state

    def replay(self, model: nn.Module, record: TaskRecord, folder: Path) -> nn.Module:
        """Put what a finished task recorded beside the base model, in the place of what is there."""
        self.keep(record)
        self._put_beside(model)
        return model

    def _router(self, name: str, d_in: int, towers: dict[str, Tower]) -> Router:
        n, share = self.config.num_experts, self.config.instance_share
        tower = towers[re.split(r"\.\d+\.", name)[0]]
        if name in self._experts:
            return Router(self._routing[f"{name}.router"], self._routing[f"{name}.tasks"], share, tower)
        return Router(nn.Linear(d_in, n, bias=False).weight, torch.zeros(0, n + d_in), share, tower)

    def _mix(self, adapted: nn.Module, state: dict[str, Tensor], task: Task) -> None:
        for name, (a, b) in lora.factors_of(adapted).items():
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise LearningError(f"task {task.name!r}: the trained experts of layer {name!r} are not finite")
            routers = state[f"{name}.tasks"][:, : self.config.num_experts].to(a.device)
            if name in self._experts and len(routers):
                shares = kept_shares(routers, self.config.top_experts, self.config.momentum)
                kept = shares.repeat_interleave(self.config.rank)
                old_a, old_b = (factor.to(a.device) for factor in self._experts[name])
                a, b = torch.lerp(a, old_a, kept.unsqueeze(1)), torch.lerp(b, old_b, kept)
                lora.set_factors(self.layers[name], a, b * self.config.rank / self.config.alpha)

    def _put_beside(self, model: nn.Module) -> None:
        while self._handles:
            self._handles.pop().remove()
        device, towers = device_of(model), defaultdict[str, Tower](Tower)
        for name, (a, b) in self._experts.items():
            router = self._router(name, a.shape[1], towers).requires_grad_(False)
            add = partial(add_experts, router.to(device), a.to(device), b.to(device))
            self._handles.append(model.get_submodule(name).register_forward_hook(add))


def kept_shares(routers: Tensor, top: int, momentum: float) -> Tensor:
    """Return what each expert keeps of its earlier self (lambda), `[n]`, given the routers of all tasks `[t, n]`.

    It is 1 - momentum for an expert among the `top` of the last task and not of the one before, else momentum.
    """
    chosen = torch.zeros_like(routers, dtype=torch.bool).scatter_(1, routers.topk(top).indices, True)
    return torch.where(chosen[-1] & ~chosen[-2:-1].any(0), 1 - momentum, momentum).to(routers.dtype)
