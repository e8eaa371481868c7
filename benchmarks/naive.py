"""KeepLoRA written down from its equations without a thought for cost: the alternative that the library is timed with.

Each function takes and returns what the library's own phase does. What is slow here is what one writes first:

- the gradient pass differentiates with respect to every parameter of the encoders and copies all gradients out;
- the principal subspace, and the start of A and B, come from the full singular value decomposition (SVD);
- features are kept as a matrix of tokens for each target layer, one for each of q, k and v, with a token in each column
  as in the equations, and decomposed by SVD;
- LoRA is a plain module around a linear layer; A is frozen, B starts at the gradient's factor and the weight is
  reduced by the start (Eq. 6 of arXiv 2601.19659).

That prompts are encoded at full length for every batch is the task's part (`workloads.PaddedClassification`).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from keeplora.models.interfaces import StreamTask
from keeplora.task import Task

Features = Literal["batch_mean", "all"]
"""How token matrices are kept: averaged over batches by position, as published code does, or all tokens, as the
equations say."""


def principal_bases(weights: dict[str, Tensor], shares: dict[str, float]) -> dict[str, Tensor]:
    """Return the leading input directions `[d_in, p]` that carry a share of each weight's energy (Eq. 2)."""
    bases = {}
    for name, weight in weights.items():
        _, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        energies = s.square()
        p = _fewest(energies, shares[name] * float(energies.sum()))
        bases[name] = vh[:p].T
    return bases


def mean_gradients(model: nn.Module, task: Task, targets: list[str]) -> dict[str, Tensor]:
    """Average the gradient of the loss over a task's examples (Eq. 4), of all parameters; return the targets'."""
    model.eval()
    model.requires_grad_(True)
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in task.batches():
        model.zero_grad()
        task.loss(model, batch).backward()
        n = task.weight(batch)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.detach().cpu() * n
                sums[name] = gradient if name not in sums else sums[name] + gradient
        count += n
    return {name: sums[f"{name}.weight"] / count for name in targets}


def start(gradients: dict[str, Tensor], bases: dict[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `a [r, d_in]` and `b [d_out, r]` from the SVD of each residual gradient (Eq. 5 and 6)."""
    factors = {}
    for name, gradient in gradients.items():
        residual = gradient - gradient @ bases[name] @ bases[name].T
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        factors[name] = (vh[:rank], u[:, :rank] * s[:rank])
    return factors


class LoRA(nn.Module):
    """A linear layer with a low-rank update beside it; only `b` is trained."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.clone(), requires_grad=False)
        self.b = nn.Parameter(b.clone())
        self.scaling = scaling
        with torch.no_grad():
            base.weight -= scaling * b @ a

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the update."""
        output: Tensor = self.base(x) + self.scaling * (x @ self.a.T) @ self.b.T
        return output


def attach(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], scaling: float) -> nn.Module:
    """Put a LoRA around every target layer, in place; its function stays as it is."""
    model.requires_grad_(False)
    for name, (a, b) in factors.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        _put(model, name, LoRA(base, a, b, scaling))
    return model


def fit(model: nn.Module, task: Task, *, epochs: int, learning_rate: float = 1e-3) -> list[float]:
    """Train every B by AdamW with one cycle; return the mean loss of each epoch."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    steps = epochs * sum(1 for _ in task.batches())
    scheduler = OneCycleLR(optimizer, learning_rate, total_steps=steps) if steps > 1 else None
    losses = []
    for _ in range(epochs):
        values = []
        for batch in task.batches():
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            values.append(loss.item())
        losses.append(sum(values) / len(values))
    return losses


def merge(model: nn.Module) -> nn.Module:
    """Add every update to its weight and take the LoRA layers out again, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            with torch.no_grad():
                layer.base.weight += layer.scaling * layer.b @ layer.a
            _put(model, name, layer.base)
    return model


def token_matrices(
    model: nn.Module, task: Task, targets: list[str], *, features: Features = "batch_mean"
) -> dict[str, Tensor]:
    """Collect the inputs `[d_in, n]` of every target layer over a task's examples (X of Eq. 8)."""
    kept: dict[str, list[Tensor]] = {name: [] for name in targets}
    counts = dict.fromkeys(targets, 0)

    def keep(name: str, inputs: Tensor, real: Tensor | None) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]) if real is None else inputs.detach()[real.bool()]
        rows = rows.float().clone()
        if features == "all" or not kept[name]:
            kept[name].append(rows)
            counts[name] = 1
        elif rows.shape == kept[name][0].shape:
            kept[name][0] += rows
            counts[name] += 1

    model.eval()
    current: list[object] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: keep(name, args[0], task.padding_mask(name, current[0]))
        )
        for name in targets
    ]
    with torch.no_grad():
        for batch in task.batches():
            current[:] = [batch]
            task.loss(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).T if features == "all" else (rows[0] / counts[name]).T for name, rows in kept.items()}


def new_directions(bases: dict[str, Tensor], matrices: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the fewest directions `[d_in, m]` that bring the covered energy of the inputs to a share (Eq. 8 to 10)."""
    directions = {}
    for name, basis in bases.items():
        inputs = matrices[name]
        residual = inputs - basis @ (basis.T @ inputs)
        total = float(inputs.square().sum())
        covered = total - float(residual.square().sum())
        u, s, _ = torch.linalg.svd(residual, full_matrices=False)
        directions[name] = u[:, : _fewest(s.square(), share * total - covered)]
    return directions


def evaluate(model: nn.Module, task: StreamTask) -> float:
    """Return the share of held-out examples that are answered rightly, in percent."""
    model.eval()
    right = count = 0
    with torch.no_grad():
        for batch in task.test_batches():
            answers, references = task.predict(model, batch), task.references(batch)
            right += int((answers == references).sum())
            count += len(references)
    return 100 * right / count


def _fewest(energies: Tensor, wanted: float) -> int:
    """Count the fewest leading energies that sum up to what is wanted."""
    if wanted <= 0:
        return 0
    return min(int((energies.double().cumsum(0) < wanted).sum()) + 1, len(energies))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
