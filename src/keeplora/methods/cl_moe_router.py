"""How LoRA experts of one layer are weighed for each row of its input: an instance router and the routers of tasks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """What the routers of one tower share: the task of each instance, found by the first of them that runs.

    The input of the first block does not pass any expert, so the mean inputs that it is compared with do not age.
    """

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
