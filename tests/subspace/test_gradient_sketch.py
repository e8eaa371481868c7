"""The sketch of a gradient: the directions of the exact one, at a stated angle, without the gradient."""

import math

import pytest
import torch
import torch.distributed as dist
from scipy.linalg import subspace_angles
from torch.utils.checkpoint import checkpoint

from keeplora.layers.gradients import exact_residuals, gradient_sketches, sketched_residuals
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.progress import silent
from keeplora.subspace import gradient_sketch
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace.gradient_sketch import GradientSketch
from keeplora.training.state_file import from_bytes
from tiny import (
    MLP,
    TokenTask,
    VectorTask,
    autograd_gradients,
    classification_task,
    clip_model,
    llama_model,
    to_bytes,
    train,
)

D_OUT, D_IN, K, R = 70, 90, 12, 3


def gradient_with(decay, seed=0):
    """A gradient whose singular values fall off by a factor, as rows that pass by."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(D_OUT, D_OUT, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(D_IN, D_OUT, generator=generator))[0]
    return u, decay ** torch.arange(D_OUT) * v


def some_basis(seed=1):
    return torch.linalg.qr(torch.randn(D_IN, K, generator=torch.Generator().manual_seed(seed)))[0]


def exact_top(gradient, basis, rank):
    return torch.linalg.svd(linalg.project_out(gradient, basis))[2][:rank]


def angle(first, second):
    return math.degrees(subspace_angles(first.T.numpy(), second.T.numpy()).max())


def sketch_of(deltas, inputs, basis, seed=0):
    found = GradientSketch(D_OUT, basis, R, seed=seed)
    for part in range(0, len(deltas), 7):
        found.add(inputs[part : part + 7], deltas[part : part + 7])
    return found


def test_a_gradient_of_low_rank_is_found_to_rounding():
    generator = torch.Generator().manual_seed(0)
    deltas, inputs = torch.randn(R, D_OUT, generator=generator), torch.randn(R, D_IN, generator=generator)
    basis = some_basis()
    s, vh = sketch_of(deltas, inputs, basis).top(R)
    assert angle(exact_top(deltas.T @ inputs, basis, R), vh) < 0.02
    exact = torch.linalg.svdvals(linalg.project_out(deltas.T @ inputs, basis))[:R]
    torch.testing.assert_close(s, exact, rtol=1e-3, atol=0)
    assert float((vh @ basis).abs().max()) < 1e-5


@pytest.mark.parametrize(("decay", "most"), [(0.6, 1.0), (0.8, 5.0)])
def test_the_angle_to_the_exact_directions_is_small_where_singular_values_fall_off(decay, most):
    u, v = gradient_with(decay)
    found = [angle(exact_top(u @ v.T, some_basis(), R), sketch_of(u.T, v.T, some_basis(), seed).top(R)[1])
             for seed in range(10)]  # fmt: skip
    assert max(found) < most


def test_memory_is_that_of_two_narrow_pictures():
    found = GradientSketch(4000, torch.zeros(5000, 0), 4, seed=0)
    numbers = sum(part.numel() for part in (found.left, found.right, *found.sums))
    assert numbers <= (4000 + 5000) * 4 * (gradient_sketch.RANGE + gradient_sketch.CORANGE)
    assert numbers < 4000 * 5000 / 20


def test_norms_are_estimated():
    u, v = gradient_with(0.9)
    found, basis = sketch_of(u.T, v.T, some_basis()), some_basis()
    exact = (u @ v.T).norm()
    assert found.norm == pytest.approx(float(exact), rel=0.2)
    share = float(linalg.project_out(u @ v.T, basis).norm() / exact)
    assert found.surviving_share == pytest.approx(share, abs=0.05)


def test_a_layer_without_room_or_gradient_has_nothing_to_give():
    full = GradientSketch(D_OUT, torch.eye(D_IN), R, seed=0)
    full.add(torch.randn(9, D_IN), torch.randn(9, D_OUT))
    assert full.surviving_share < 1e-5
    empty = GradientSketch(D_OUT, some_basis(), R, seed=0)
    assert (empty.norm, empty.surviving_share) == (0, 0)
    assert len(empty.top(R)[0]) == len(empty.top(R)[1]) == 0


CASES = {
    "mlp": (MLP, VectorTask, ["fc1", "fc2", "out"]),
    "clip": (clip_model, classification_task, [f"{tower}_model.encoder.layers.{i}.self_attn.{name}_proj"
             for tower in ("text", "vision") for i in range(2) for name in ("q", "k", "v", "out")]),
    "llama": (llama_model, TokenTask, [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_the_pass_sketches_the_gradient_that_autograd_gives(kind):
    build, make_task, names = CASES[kind]
    model, gradients = build(), autograd_gradients(build(), make_task(), names)
    count = sum(make_task().weight(batch) for batch in make_task().batches())
    sketches = {name: GradientSketch(len(gradients[name]), torch.zeros(gradients[name].shape[1], 0), 2, seed=3)
                for name in names}  # fmt: skip
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradient_sketches(model, make_task(), sketches)
    for name, found in sketches.items():
        whole = gradients[name] * count
        torch.testing.assert_close(found.range, whole @ found.right, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.corange, found.left @ whole, rtol=1e-3, atol=1e-4)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", CASES)
def test_keeplora_starts_from_the_same_directions_by_a_sketch(kind):
    build, make_task, names = CASES[kind]
    bases = KeepLoRA(KeepLoRAConfig(targets=tuple(names), weight_energy=0.3))
    bases.protect(build())
    both = [residuals(build(), make_task(), bases.bases, 2, 1.0, silent)
            for residuals in (exact_residuals, sketched_residuals)]  # fmt: skip
    for name in names:
        exact, rows = (found.rows[name] for found in both)
        s = torch.linalg.svdvals(exact)
        if s[1] > 1e-3 * s[0] and s[1] > 1.5 * s[2]:
            assert angle(torch.linalg.svd(exact)[2][:2], torch.linalg.svd(rows)[2][:2]) < 5
        assert len(rows) <= 2


def test_a_sketch_leaves_nothing_in_the_protected_subspace_and_learns():
    config = KeepLoRAConfig(rank=2, targets=("fc1", "fc2", "out"), weight_energy=0.4, gradient="sketch")
    method, model, task = KeepLoRA(config), MLP(), VectorTask()
    before = float(task.loss(model, task.data[0]).detach())
    adapted = method.before_task(model, task)
    train(adapted, task, epochs=4, lr=0.5)
    model = method.after_task(adapted, task)
    assert max(layer.leak for layer in method.record.certificate.values()) < 1e-5
    assert float(task.loss(model, task.data[0]).detach()) < before


def test_equal_seeds_give_equal_sketches():
    config = KeepLoRAConfig(rank=2, targets=("fc1", "out"), weight_energy=0.4, gradient="sketch")
    files = []
    for _ in range(2):
        method, task = KeepLoRA(config), VectorTask()
        torch.manual_seed(0)
        method.after_task(method.before_task(MLP(), task), task)
        files.append(method.record.adapter.files())
    assert files[0] == files[1]


def test_the_sketch_has_no_gradient_to_start_b_from():
    with pytest.raises(ValueError, match="needs the gradient itself; set gradient = 'exact'"):
        KeepLoRAConfig(gradient="sketch", b_start="gradient")


def sketches_of(model, task, rank=2):
    layers = {name: model.get_submodule(name) for name in ("fc1", "fc2", "out")}
    found = {name: GradientSketch(layer.out_features, torch.zeros(layer.in_features, 0), rank, seed=0)
             for name, layer in layers.items()}  # fmt: skip
    gradient_sketches(model, task, found)
    return found


def as_autograd_finds(model, task, found):
    """Compare sketches with those of the gradients that autograd gives."""
    gradients = autograd_gradients(model, task, list(found))
    count = sum(task.weight(batch) for batch in task.batches())
    for name, one in found.items():
        whole = gradients[name] * count
        assert whole.abs().max() > 0
        torch.testing.assert_close(one.range, whole @ one.right, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.corange, one.left @ whole, rtol=1e-3, atol=1e-4)


class InPlace(MLP):
    """Changes the outputs of its layers in place."""

    def forward(self, x):
        return self.out(self.fc2(self.fc1(x).relu_()).relu_())


class Checkpointed(MLP):
    """Computes its hidden layers anew in the backward pass."""

    def forward(self, x):
        hidden = lambda rows: torch.tanh(self.fc2(torch.tanh(self.fc1(rows))))  # noqa: E731
        return self.out(checkpoint(hidden, x, use_reentrant=False))


class Taught(VectorTask):
    """Compares with what the model itself says of other data, as a teacher: no gradient goes there."""

    def loss(self, model, batch):
        with torch.no_grad():
            teacher = model(batch[0].flip(1)).softmax(1)
        return super().loss(model, batch) + ((model(batch[0]) - teacher) ** 2).mean()


class Asking(VectorTask):
    """Differentiates on its own while the loss is computed."""

    def loss(self, model, batch):
        inputs = batch[0].clone().requires_grad_()
        torch.autograd.grad(super().loss(model, (inputs, batch[1])), [inputs])
        return super().loss(model, batch)


class InParts(VectorTask):
    def micro_batches(self, batch):
        return [(batch[0][:0], batch[1][:0]), *zip(batch[0].split(3), batch[1].split(3), strict=True)]


@pytest.mark.parametrize("kind", [MLP, InPlace, Checkpointed])
@pytest.mark.parametrize("task", [VectorTask, Taught, Asking, InParts])
def test_the_pass_sees_the_gradient_whatever_model_and_loss_do(kind, task):
    found = sketches_of(kind(), task())
    as_autograd_finds(kind(), task(), found)


def test_layers_that_share_a_weight_share_what_is_found_of_it():
    class Twice(MLP):
        def __init__(self):
            super().__init__()
            self.again = torch.nn.Linear(11, 17)
            self.again.weight = self.fc1.weight

        def forward(self, x):
            return self.out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)) + torch.tanh(self.again(x.flip(1))))))

    model = Twice()
    found = {name: GradientSketch(17, torch.zeros(11, 0), 2, seed=0) for name in ("fc1", "again")}
    gradient_sketches(model, VectorTask(), found)
    as_autograd_finds(model, VectorTask(), found)


def test_a_loss_that_needs_second_derivatives_is_refused_and_not_sketched_wrongly():
    class Penalised(VectorTask):
        def loss(self, model, batch):
            inputs = batch[0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(super().loss(model, (inputs, batch[1])), [inputs], create_graph=True)
            return (gradient**2).sum()

    with pytest.raises(ValueError, match="'vectors': its loss takes second derivatives, which no statistic sees"):
        sketches_of(MLP(), Penalised())


def test_a_layers_gradient_is_sketched_before_the_pass_goes_on_and_no_weight_gets_one(monkeypatch):
    model, events = MLP(), []
    add = GradientSketch.add

    def watched(self, inputs, output_gradients, weight):
        events.append("sketch")
        assert not any(parameter.requires_grad for parameter in model.parameters())
        add(self, inputs, output_gradients, weight)

    monkeypatch.setattr(GradientSketch, "add", watched)
    for name in ("fc1", "fc2", "out"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: output.register_hook(lambda _: events.append(name)) and None
        )
    sketches_of(model, VectorTask())
    assert events == ["out", "sketch", "fc2", "sketch", "fc1", "sketch"] * len(VectorTask().data)


def test_hooks_that_change_a_layers_output_do_not_change_what_is_sketched():
    def doubled():
        model = MLP()
        model.fc2.register_forward_hook(lambda module, args, output: 2 * output)
        return model

    as_autograd_finds(doubled(), VectorTask(), sketches_of(doubled(), VectorTask()))


def test_a_weight_that_is_used_outside_the_targets_is_refused():
    class Tied(MLP):
        def forward(self, x):
            return super().forward(x + self.table(torch.zeros(len(x), dtype=torch.long)))

    model = Tied()
    model.table = torch.nn.Embedding(17, 11)
    model.table.weight = model.fc1.weight
    with pytest.raises(ValueError, match="'vectors': its loss uses the weight of layer 'fc1' past the layer"):
        sketches_of(model, VectorTask())


def test_prompts_are_encoded_once_for_all_batches():
    model, task, calls = clip_model(), classification_task(), []
    model.text_model.register_forward_hook(lambda *args: calls.append(1))
    names = CASES["clip"][2]
    found = {name: GradientSketch(len(model.get_parameter(f"{name}.weight")),
                          torch.zeros(model.get_parameter(f"{name}.weight").shape[1], 0), 2, seed=3)
             for name in names}  # fmt: skip
    gradient_sketches(model, task, found)
    assert len(calls) == 1 < len(list(task.batches()))
    assert all(float(one.range.norm()) > 0 for one in found.values())


class Bad(VectorTask):
    def loss(self, model, batch):
        return super().loss(model, batch) * float("nan")


def test_what_is_not_finite_or_not_there_is_an_error():
    names = {"fc1": GradientSketch(17, torch.zeros(11, 0), 2, seed=0)}
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        gradient_sketches(MLP(), Bad(), names)
    with pytest.raises(ValueError, match="gave no batch"):
        gradient_sketches(MLP(), VectorTask(sizes=()), names)


def sketch_in_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: GradientSketch(d_out, torch.zeros(d_in, 0), 2, seed=0) for name, d_out, d_in in (("fc1", 17, 11),)}
    gradient_sketches(MLP(), VectorTask(sizes=(9, 4, 1, 6, 3)), found)
    (folder / f"{rank}.safetensors").write_bytes(to_bytes(list(found["fc1"].sums)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_sketch_what_one_sketches(tmp_path):
    torch.multiprocessing.spawn(sketch_in_one_of_two, (tmp_path,), nprocs=2)
    alone = {"fc1": GradientSketch(17, torch.zeros(11, 0), 2, seed=0)}
    gradient_sketches(MLP(), VectorTask(sizes=(9, 4, 1, 6, 3)), alone)
    for rank in (0, 1):
        for part, expected in zip(
            from_bytes((tmp_path / f"{rank}.safetensors").read_bytes()), alone["fc1"].sums, strict=True
        ):
            torch.testing.assert_close(part, expected)
