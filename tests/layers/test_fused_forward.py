"""Faster forward passes, against the stock ones."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.activations import QuickGELUActivation

from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import lora as adapter
from keeplora.layers.fused_forward import fused_layers, lora_linear, quick_gelu
from keeplora.layers.gradients import mean_gradients
from keeplora.task import Task
from keeplora.training.trainer import TrainConfig, fit
from tiny import MLP, VectorTask, classification_task, clip_model, siglip_model

D_OUT, D_IN, R = 7, 11, 3


def doubles(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * len(shape) + shape[0])
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def adapted_mlp(*, frozen=True, b_start=0.1):
    model = MLP()
    ranks = {"fc1": 3, "fc2": 2, "out": 4}
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, r in ranks.items():
        d_out, d_in = model.get_submodule(name).weight.shape
        factors[name] = (
            torch.randn(r, d_in, generator=generator),
            b_start * torch.randn(d_out, r, generator=generator),
        )
    adapted = adapter.attach(model, ranks, {"fc1": 1.0, "fc2": 0.5, "out": 6.0}, factors=factors)
    if not frozen:
        adapter.thaw_a(adapted)
    return adapted


def lent(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def rows(n, seed=0):
    return torch.randn(n, 11, generator=torch.Generator().manual_seed(seed))


# The two functions


@pytest.mark.parametrize("shape", [(6, D_IN), (2, 5, D_IN), (2, 3, 4, D_IN)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_lora_linear_is_the_layer_with_its_update_and_so_are_its_gradients(shape, has_bias):
    x, weight, a, b = doubles(*shape), doubles(D_OUT, D_IN), doubles(R, D_IN), doubles(D_OUT, R)
    bias = doubles(D_OUT) if has_bias else None
    out = lora_linear(x, weight, bias, a, b)
    wanted = x @ weight.T + x @ a.T @ b.T + (bias if has_bias else 0)
    torch.testing.assert_close(out, wanted)
    upstream = doubles(*out.shape, seed=5).detach()
    ours, reference = (torch.autograd.grad(value, (x, b), upstream) for value in (out, wanted))
    for gradient, slow in zip(ours, reference, strict=True):
        torch.testing.assert_close(gradient, slow)


def test_lora_linear_gives_no_gradient_to_what_is_frozen():
    x, weight, a, b = doubles(6, D_IN), doubles(D_OUT, D_IN), doubles(R, D_IN), doubles(D_OUT, R)
    lora_linear(x, weight, None, a, b).sum().backward()
    assert weight.grad is None
    assert a.grad is None
    assert torch.autograd.gradcheck(lambda x, b: lora_linear(x, weight.detach(), None, a.detach(), b), (x, b))


def test_lora_linear_keeps_neither_its_input_nor_its_output():
    x, b = torch.randn(1000, D_IN, requires_grad=True), torch.randn(D_OUT, R, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        lora_linear(x, torch.randn(D_OUT, D_IN), None, torch.randn(R, D_IN), b)
    assert max(kept) == 1000 * R


def test_quick_gelu_is_the_stock_one_and_so_is_its_gradient():
    x = (3 * doubles(4, 50)).detach().requires_grad_()
    out, wanted = quick_gelu(x), QuickGELUActivation()(x)
    torch.testing.assert_close(out, wanted)
    upstream = doubles(4, 50, seed=2).detach()
    before = upstream.clone()
    torch.testing.assert_close(*(torch.autograd.grad(value, x, upstream)[0] for value in (out, wanted)))
    assert upstream.equal(before)
    assert torch.autograd.gradcheck(quick_gelu, (x,))


@pytest.mark.parametrize(
    "function", [quick_gelu, lambda x: lora_linear(x, doubles(5, 4), None, doubles(2, 4), x[:, :2])]
)
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(function):
    x = doubles(5, 4)
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_quick_gelu_does_not_change_its_input():
    x = doubles(4, 5).detach()
    before = x.clone()
    quick_gelu(x)
    assert x.equal(before)


# Lending


def test_layers_are_lent_inside_only_and_given_back_when_a_batch_raises():
    model = adapted_mlp()
    inside = []

    def stop():
        inside.extend(lent(model))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), fused_layers(model):
        stop()
    assert len(inside) == 3
    assert lent(model) == []


def test_lending_twice_gives_back_once_at_the_end():
    model = adapted_mlp()
    with fused_layers(model):
        with fused_layers(model):
            assert len(lent(model)) == 3
        assert len(lent(model)) == 3
    assert lent(model) == []


def test_every_quick_gelu_of_clip_is_lent_and_none_of_siglip():
    with fused_layers(clip := clip_model()):
        assert len(lent(clip)) == 4
    with fused_layers(siglip := siglip_model()):
        assert lent(siglip) == []


@pytest.mark.parametrize("n", [40, 2], ids=["many rows", "few rows"])
def test_a_lent_model_computes_and_learns_what_the_stock_one_does(n):
    model = adapted_mlp()
    results = []
    for context in (fused_layers, lambda model: torch.enable_grad()):
        model.zero_grad()
        with context(model):
            out = model(rows(n))
            out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


def never_lent():
    trained_a = adapted_mlp(frozen=False)
    merged = adapted_mlp()
    merged.merge_adapter()
    disabled = adapted_mlp()
    disabled.base_model.disable_adapter_layers()
    two = adapted_mlp()
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    thawed = adapted_mlp()
    for layer in adapter.lora_layers(thawed).values():
        layer.get_base_layer().weight.requires_grad_(True)
    dropping = adapted_mlp()
    for layer in adapter.lora_layers(dropping).values():
        layer.lora_dropout["default"] = nn.Dropout(0.5)
    return {"a is trained": trained_a, "merged": merged, "disabled": disabled, "two adapters": two,
            "the weight is trained": thawed, "dropout": dropping}  # fmt: skip


@pytest.mark.parametrize("kind", never_lent())
def test_a_layer_that_computes_something_else_keeps_its_own_forward_pass(kind):
    model = never_lent()[kind]
    with fused_layers(model):
        assert lent(model) == []


def test_adapters_of_another_name_keep_their_own_forward_pass():
    model = get_peft_model(MLP(), LoraConfig(r=2, target_modules=["fc1"]), adapter_name="one")
    with fused_layers(model):
        assert lent(model) == []
        model(rows(40))
    named = adapted_mlp()
    wanted = named(rows(40))
    with fused_layers(named):
        named.add_adapter("other", named.peft_config["default"])
        named.set_adapter("other")
        named.delete_adapter("default")
        assert not torch.allclose(named(rows(40)), wanted)


def test_other_precision_takes_the_stock_way():
    model = adapted_mlp()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(rows(40))
        with fused_layers(model):
            assert model(rows(40)).equal(wanted)
    half = adapted_mlp().bfloat16()
    wanted = half(rows(40).bfloat16())
    with fused_layers(half):
        assert half(rows(40).bfloat16()).equal(wanted)


def test_a_lent_forward_pass_leaves_a_layers_hooks_alone():
    model, seen = adapted_mlp(), []
    layer = adapter.lora_layers(model)["fc2"]
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with fused_layers(model):
        model(rows(40))
    assert len(seen) == 1


def inner_layer(model, name="fc2"):
    return adapter.lora_layers(model)[name]


def test_what_a_model_is_told_inside_holds_at_once():
    model, x = adapted_mlp(), rows(40)
    base = MLP()(x)
    wanted = model(x)
    with fused_layers(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), base)
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        adapter.thaw_a(model)
        model(x).sum().backward()
        assert all(layer.lora_A["default"].weight.grad is not None for layer in adapter.lora_layers(model).values())


@pytest.mark.parametrize("inside", ["base_layer", "lora_A", "lora_B"])
def test_a_hook_on_a_layer_inside_is_called(inside):
    model, seen = adapted_mlp(), []
    layer = getattr(inner_layer(model), inside)
    layer = layer["default"] if inside.startswith("lora") else layer
    with fused_layers(model):
        layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        model(rows(40))
    assert len(seen) == 1


def test_a_forward_pass_that_somebody_else_puts_there_meanwhile_stays():
    model = clip_model()
    module = next(module for module in model.modules() if type(module) is QuickGELUActivation)
    with fused_layers(model):
        module.forward = other = lambda x: x
    assert vars(module)["forward"] is other
    assert len(lent(model)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quick_gelu_in_half_precision_is_the_stock_one_bit_by_bit(dtype):
    x = torch.tensor([-6e4, -50.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 50.0, 6e4], dtype=dtype)
    assert quick_gelu(x).equal(QuickGELUActivation()(x))


def test_training_lends_layers_and_leaves_a_stock_model_behind():
    model, stock = adapted_mlp(b_start=0.0), adapted_mlp(b_start=0.0)
    inside = []

    class Watching(VectorTask):
        def loss(self, model, batch):
            inside.append(len(lent(adapter.inner(model))))
            return super().loss(model, batch)

    fit(model, Watching(sizes=(30, 30)), TrainConfig(epochs=3, learning_rate=0.01))
    assert set(inside) == {3}
    assert lent(model) == []
    assert isinstance(model, PeftModel)
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=0.01, weight_decay=0.01)
    task = VectorTask(sizes=(30, 30))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=6)
    for batch in [batch for _ in range(3) for batch in task.batches()]:
        optimizer.zero_grad()
        task.loss(stock, batch).backward()
        optimizer.step()
        scheduler.step()
    for name, (_, b) in adapter.factors_of(model).items():
        torch.testing.assert_close(b, adapter.factors_of(stock)[name][1], rtol=1e-3, atol=1e-6)


# Parts of batches and what is computed once for all of them


def with_small_parts(task, monkeypatch):
    monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", 2 * 3 * 16 * 16)
    batch = next(iter(task.batches()))
    parts = list(task.micro_batches(batch))
    assert len(parts) > 1
    assert torch.cat([part["labels"] for part in parts]).equal(batch["labels"])
    assert torch.cat([part["pixel_values"] for part in parts]).equal(batch["pixel_values"])
    assert max(task.weight(part) for part in parts) == 2
    return task


class AsGiven(Task):
    """A task without parts, and nothing frozen."""

    def __init__(self, task):
        self.name, self.batches, self.loss, self.weight = task.name, task.batches, task.loss, task.weight


@pytest.mark.parametrize(("kind", "make"), [("clip", clip_model), ("siglip", siglip_model)])
def test_the_gradient_by_parts_with_prompts_encoded_once_is_that_of_whole_batches(kind, make, monkeypatch):
    model = make()
    targets = adapter.linear_targets(model, ("q_proj", "v_proj", "fc2"))
    calls = []
    model.text_model.register_forward_hook(lambda *args: calls.append(1))
    task = with_small_parts(classification_task(kind=kind), monkeypatch)
    ours = mean_gradients(model, task, targets)
    assert len(calls) == 1
    wanted = mean_gradients(model, AsGiven(classification_task(kind=kind)), targets)
    assert len(calls) > 2
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_what_is_computed_once_in_half_precision_is_differentiated_from_a_sum_in_full():
    model, task = clip_model().bfloat16(), classification_task()
    targets = ["text_model.encoder.layers.0.self_attn.v_proj"]
    half = [{**batch, "pixel_values": batch["pixel_values"].bfloat16()} for batch in task.batches()]
    task.batches = lambda: 40 * half
    many = mean_gradients(model, task, targets)[targets[0]]
    task.batches = lambda: half
    few = mean_gradients(model, task, targets)[targets[0]]
    assert (many - few).norm() < 0.02 * few.norm()


def test_scores_do_not_depend_on_the_parts_of_batches(monkeypatch):
    model = clip_model()
    whole = evaluate(model, [classification_task()])
    assert evaluate(model, [with_small_parts(classification_task(), monkeypatch)]) == whole


def test_a_models_weights_and_flags_are_as_before_the_gradient_pass():
    model, task = clip_model(), classification_task()
    before = copy.deepcopy(model.state_dict())
    mean_gradients(model, task, adapter.linear_targets(model, ("q_proj",)))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert lent(model) == []
