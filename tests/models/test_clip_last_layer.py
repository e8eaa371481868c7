"""The vision tower's last layer for the pooled row alone, against all rows."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F
from transformers import CLIPModel

from keeplora.evaluation.evaluate import evaluate
from keeplora.layers import lora
from keeplora.layers.fused_forward import fused_layers
from keeplora.layers.gradients import gradient_sketches, mean_gradients
from keeplora.layers.input_covariance import input_grams
from keeplora.models import dual_encoder
from keeplora.models.clip_last_layer import only_the_pooled_row
from keeplora.subspace.gradient_sketch import GradientSketch
from tiny import autograd_gradients, classification_task, clip_model, siglip_model

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def last_layer(model):
    return next(m for name, m in model.named_modules() if name.endswith("vision_model.encoder.layers.1"))


@pytest.fixture
def all_rows(monkeypatch):
    """Switch the short way off when called."""
    return lambda: monkeypatch.setattr(dual_encoder, "only_the_pooled_row", lambda model: nullcontext())


def adapted(model):
    targets = lora.linear_targets(model, ("q_proj", "v_proj", "out_proj"))
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name in targets:
        d_out, d_in = model.get_submodule(name).weight.shape
        factors[name] = (torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator) / 9)
    return lora.attach(model, dict.fromkeys(targets, 2), dict.fromkeys(targets, 1.0), factors=factors)


def rows_in_the_mlp(model, run):
    """Return how many rows of each image reach the last layer's feed-forward part, seen from inside its activation."""
    seen, activation = [], last_layer(model).mlp.activation_fn
    original = type(activation).forward
    activation.forward = lambda x: (seen.append(x.shape[1] if x.dim() == 3 else 1), original(activation, x))[1]
    try:
        run()
    finally:
        del activation.forward
    return set(seen)


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["plain", "adapted"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_all_gradients_are_those_of_all_rows(all_rows, wrap, training):
    model, task = wrap(clip_model()).train(training), classification_task()
    batch = next(iter(task.batches()))
    results = []
    for switch in (lambda: None, all_rows):
        switch()
        model.zero_grad()
        outputs = task.outputs(model, batch)
        F.cross_entropy(outputs, batch["labels"]).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (ours, short), (wanted, long) = results
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert short.keys() == long.keys()
    assert len(long) > 10
    for name, gradient in long.items():
        torch.testing.assert_close(short[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6)


def test_only_the_pooled_row_reaches_the_feed_forward_part():
    model, task = clip_model(), classification_task()
    batch = next(iter(task.batches()))
    assert rows_in_the_mlp(model, lambda: task.loss(model, batch)) == {1}
    assert rows_in_the_mlp(model, lambda: evaluate(model, [task])) == {1}
    assert rows_in_the_mlp(model, lambda: mean_gradients(model, task, ["visual_projection"])) == {1}
    assert rows_in_the_mlp(model, lambda: model(pixel_values=batch["pixel_values"], **task.prompts)) == {5}


def test_logits_do_not_depend_on_what_requires_a_gradient():
    model, task = clip_model(), classification_task()
    batch = next(iter(task.batches()))
    with torch.no_grad():
        before = task.outputs(model, batch)
        assert task.outputs(model.requires_grad_(False), batch).equal(before)


@pytest.mark.parametrize("fused", [False, True])
def test_only_the_pooled_row_reaches_the_feed_forward_part_of_an_adapted_model(fused):
    model, task = adapted(clip_model()).train(), classification_task()
    batch = next(iter(task.batches()))
    with fused_layers(model) if fused else nullcontext():
        assert rows_in_the_mlp(model, lambda: task.loss(model, batch).backward()) == {1}


def test_scores_are_those_of_all_rows(all_rows):
    model, task = clip_model(), classification_task()
    scores = evaluate(model, [task])
    all_rows()
    assert evaluate(model, [task]) == scores


def test_gradients_of_a_task_are_those_of_all_rows(all_rows):
    model, task = clip_model(), classification_task()
    targets = lora.linear_targets(model, TARGETS)
    short = mean_gradients(model, task, targets)
    all_rows()
    for name, gradient in mean_gradients(model, classification_task(), targets).items():
        torch.testing.assert_close(short[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-6)


def test_statistics_of_the_last_layers_inputs_see_all_rows():
    model, task = clip_model(), classification_task()
    targets = [
        name for name in lora.linear_targets(model, TARGETS) if name.startswith("vision_model.encoder.layers.1.")
    ]
    assert len(targets) == 6
    for target in targets:  # Each alone: one hook is enough.
        assert rows_in_the_mlp(model, lambda target=target: input_grams(model, task, [target])) == {5}


def test_a_gradient_of_the_last_layer_is_read_from_the_one_row_that_it_is_made_of():
    model, task = clip_model(), classification_task()
    name = "vision_model.encoder.layers.1.self_attn.q_proj"
    sketches = {name: GradientSketch(24, torch.zeros(24, 0), 2, seed=0)}
    assert rows_in_the_mlp(model, lambda: gradient_sketches(model, task, sketches)) == {1}
    whole = autograd_gradients(clip_model(), classification_task(), [name])[name]
    whole = whole * sum(task.weight(batch) for batch in task.batches())
    torch.testing.assert_close(sketches[name].range, whole @ sketches[name].right, rtol=1e-3, atol=1e-4)


def watch(model):
    last_layer(model).register_forward_hook(lambda *_: None)


def watch_the_tower(model):
    model.vision_model.register_forward_hook(lambda *_: None)


def watch_the_encoder(model):
    model.vision_model.encoder.register_forward_pre_hook(lambda *_: None)


def watch_gradients(model):
    last_layer(model).mlp.fc1.register_full_backward_hook(lambda *_: None)


def attend_otherwise(model):
    model.set_attn_implementation("eager")


def adapt_with_dropout(model):
    layer = last_layer(model)
    config = LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.5)
    inject_adapter_in_model(config, layer)


def put_another_network_inside(model):
    class Mixing(type(last_layer(model).mlp)):
        """Some other feed-forward part."""

    last_layer(model).mlp.__class__ = Mixing


def recompute(model):
    model.activation_checkpointing_enable()


def drop(model):
    last_layer(model).self_attn.dropout = 0.5


def replace_forward(model):
    layer = last_layer(model)
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [watch, watch_the_tower, watch_the_encoder, watch_gradients, attend_otherwise, adapt_with_dropout,
     put_another_network_inside, recompute, drop, replace_forward],
)  # fmt: skip
def test_a_layer_that_is_not_plain_computes_all_rows(change):
    model, task = clip_model().train(), classification_task()
    change(model)
    batch = next(iter(task.batches()))
    assert rows_in_the_mlp(model, lambda: task.loss(model, batch).backward()) == {5}


def test_a_hook_that_comes_during_the_forward_pass_sees_all_rows():
    model, task, shapes = clip_model(), classification_task(), []
    batch = next(iter(task.batches()))

    def hook_the_last(*_):
        last_layer(model).register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))

    first = model.vision_model.encoder.layers[0].register_forward_hook(hook_the_last)
    task.loss(model, batch)
    first.remove()
    assert shapes == [5]


def test_a_clip_that_pools_in_another_way_computes_all_rows():
    class Averaging(CLIPModel):
        """Reads all rows."""

    model, task = clip_model(), classification_task()
    model.__class__ = Averaging
    assert rows_in_the_mlp(model, lambda: task.loss(model, next(iter(task.batches())))) == {5}


def test_the_layer_is_given_back_when_the_batch_raises():
    model = clip_model()

    def stop():
        assert "forward" in vars(last_layer(model))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), only_the_pooled_row(model):
        stop()
    assert "forward" not in vars(last_layer(model))


def test_a_tower_that_pools_otherwise_is_left_alone():
    model = siglip_model()
    with only_the_pooled_row(model):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_left_alone(in_place):
    model = clip_model()
    with only_the_pooled_row(model):
        assert "forward" in vars(last_layer(model))
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    with only_the_pooled_row(compiled):
        assert "forward" not in vars(last_layer(model))
