import dataclasses
import logging
import math
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from keeplora.layers.gradients import mean_gradients
from keeplora.layers.lora import linear_targets
from keeplora.layers.names import layer_scales
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import LoRAFT, ZeroShot
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.methods.registry import METHODS
from keeplora.training.trainer import TrainConfig, fit
from tiny import (
    MLP,
    NarrowTask,
    TokenTask,
    VectorTask,
    WideMLP,
    classification_task,
    clip_model,
    llama_model,
    siglip_model,
    train,
    write_adapter,
)

# A model, a task by name and seed, and the options that suit them.
FAMILIES = {
    "clip": (clip_model, classification_task, {}),
    "siglip": (siglip_model, lambda name, seed: classification_task(name, seed, kind="siglip"), {}),
    "llama": (llama_model, TokenTask, {"weight_energy": 0.4}),
    "mlp": (MLP, VectorTask, {"weight_energy": 0.4, "targets": ("fc1", "fc2", "out")}),
}
MLP_OPTIONS = {"targets": ("fc1", "fc2", "out"), "weight_energy": 0.4, "feature_energy": 0.6, "rank": 3, "alpha": 2.0}


def method_for(name, options):
    kind = METHODS[name].Config
    options = {"rank": 3, "alpha": 2.0, "feature_energy": 0.6, **options}
    known = {field.name for field in dataclasses.fields(kind)}
    return METHODS[name](kind(**{key: value for key, value in options.items() if key in known}))


def keeplora(**options):
    return KeepLoRA(KeepLoRAConfig(**{**MLP_OPTIONS, **options}))


def logits(model, task):
    with torch.no_grad():
        return task.outputs(model.eval(), next(iter(task.batches())))


def weights_of(model, names):
    return {name: model.get_submodule(name).weight.detach().double().clone() for name in names}


def update_of(record, name, scaling):
    """Return one layer's update from the saved adapter, in float64."""
    a, b = (record.adapter.weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return scaling * b @ a


def lora(adapted, name):
    layer = adapted.base_model.model.get_submodule(name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


# The contract of every method on every family


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=METHODS)
def method_name(request):
    return request.param


def learn_two_tasks(method_name, family):
    build, make_task, options = family
    model, method = build(), method_for(method_name, options)
    torch.manual_seed(7)
    for seed in (0, 1):
        task = make_task(f"task{seed}", seed)
        adapted = method.before_task(model, task)
        train(adapted, task)
        model = method.after_task(adapted, task)
    return model, method


def test_before_task_does_not_change_the_function(method_name, family):
    build, make_task, options = family
    model, wanted = build(), logits(build(), make_task("task", 0))
    adapted = method_for(method_name, options).before_task(model, make_task("task", 0))
    torch.testing.assert_close(logits(adapted, make_task("task", 0)), wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_after_task_the_plain_model_is_what_was_trained(method_name, family):
    build, make_task, options = family
    model, method, task = build(), method_for(method_name, options), make_task("task", 0)
    start = logits(model, make_task("task", 0))
    adapted = method.before_task(model, task)
    train(adapted, task)
    wanted = logits(adapted, make_task("task", 0))
    merged = method.after_task(adapted, task)
    torch.testing.assert_close(logits(merged, make_task("task", 0)), wanted, atol=1e-5, rtol=1e-6)
    assert type(merged) is type(build())
    assert list(merged.state_dict()) == list(build().state_dict())
    learned = float((wanted - start).abs().max())
    assert learned == 0 if method_name == "zero_shot" else learned > 1e-3  # routed experts learn slowly
    assert method.record.merge_error < 1e-3, "relative to the update, which is small"


@pytest.mark.slow
def test_parameters_require_a_gradient_as_they_did_before(method_name, family):
    build, make_task, options = family
    model, method = build(), method_for(method_name, options)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for seed in (0, 1):
        task = make_task(f"task{seed}", seed)
        adapted = method.before_task(model, task)
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name for name in trained)
        train(adapted, task, epochs=1)
        model = method.after_task(adapted, task)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.slow
def test_two_runs_are_identical(method_name, family):
    (first, method), (again, other) = (learn_two_tasks(method_name, family) for _ in range(2))
    for (name, value), repeated in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert value.equal(repeated), name
    if method.record.adapter is not None:
        assert method.record.adapter.files() == other.record.adapter.files()
    for name, value in method.record.directions.items():
        assert value.equal(other.record.directions[name])


@pytest.mark.slow
def test_nothing_outside_the_targets_changes(method_name, family):
    build, _, options = family
    model, _ = learn_two_tasks(method_name, family)
    targets = linear_targets(build(), options.get("targets", MethodConfig().targets))
    for (name, value), start in zip(model.state_dict().items(), build().state_dict().values(), strict=True):
        if name.removesuffix(".weight") not in targets:
            assert value.equal(start), name


def test_a_method_needs_targets_that_the_model_has(method_name):
    if method_name == "zero_shot":
        pytest.skip("adapts nothing")
    with pytest.raises(ValueError, match="named w_q; set targets to some of: fc1, fc2, out"):
        method_for(method_name, {"targets": ("w_q",), "weight_energy": 0.4}).before_task(MLP(), VectorTask())


def test_lora_ft_trains_both_factors():
    adapted = LoRAFT(MethodConfig(targets=("fc1",), rank=3)).before_task(MLP(), VectorTask())
    a, b = lora(adapted, "fc1")
    assert a.requires_grad
    assert b.requires_grad


def test_zero_shot_learns_nothing():
    model, method = MLP(), ZeroShot(MethodConfig())
    adapted = method.before_task(model, VectorTask())
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert method.after_task(adapted, VectorTask()) is model
    assert method.record.adapter is None


# Propositions of the paper


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_proposition_1_training_b_is_gradient_descent_projected_on_the_span_of_a(scale):
    names, rate = ("fc1", "fc2", "out"), 0.4
    method, task = keeplora(alpha=6.0 * scale), VectorTask(sizes=(20,))
    adapted = method.before_task(MLP(), task)
    spans = {name: lora(adapted, name)[0].detach().double() for name in names}
    scaling = 6.0 * scale / 3
    reference = MLP().double()
    rows, labels = task.data[0][0].double(), task.data[0][1]
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    start = weights_of(reference, names)
    for _ in range(8):
        gradients = torch.autograd.grad(
            F.cross_entropy(reference(rows), labels), [reference.get_submodule(name).weight for name in names]
        )
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                projected = gradient @ spans[name].T @ spans[name]
                reference.get_submodule(name).weight -= rate * scaling**2 * projected
        optimizer.zero_grad()
        task.loss(adapted, task.data[0]).backward()
        optimizer.step()
        for name in names:
            a, b = (factor.detach().double() for factor in lora(adapted, name))
            moved = reference.get_submodule(name).weight.detach() - start[name]
            torch.testing.assert_close(scaling * b @ a, moved, atol=1e-5, rtol=0)
    assert all((reference.get_submodule(name).weight - start[name]).abs().max() > 1e-2 for name in names)


def best_kept(gradient, basis, r):
    """Return the most that a rank-r subspace orthogonal to the basis can keep of a gradient's energy."""
    outside = torch.eye(len(basis)).double() - basis.double() @ basis.double().T
    return float(torch.linalg.eigvalsh(outside @ gradient.double().T @ gradient.double() @ outside)[-r:].sum())


def test_proposition_2_no_subspace_orthogonal_to_what_is_protected_keeps_more_of_the_gradient():
    r, task = 3, VectorTask()
    gradients = mean_gradients(MLP(), task, ["fc1", "fc2", "out"])
    method = keeplora(rank=r)
    adapted = method.before_task(MLP(), task)
    generator = torch.Generator().manual_seed(0)
    for name, gradient in gradients.items():
        gradient, basis = gradient.double(), method.bases[name].double()
        a = lora(adapted, name)[0].detach().double()
        assert basis.shape[1] > 0
        torch.testing.assert_close(a @ a.T, torch.eye(r).double(), atol=1e-5, rtol=0)
        assert (a @ basis).abs().max() < 1e-5
        kept = float((gradient @ a.T).square().sum())
        assert kept == pytest.approx(best_kept(gradient, basis, r), rel=1e-4)
        # The gradient's own top directions are better only because they are not orthogonal to the basis.
        assert kept < float(torch.linalg.svdvals(gradient)[:r].square().sum()) * (1 - 1e-3)
        for trial in range(300):
            far = torch.randn(r, a.shape[1], generator=generator, dtype=torch.float64)
            rows = far if trial % 2 else a + 0.1 * far
            rival = torch.linalg.qr((rows - rows @ basis @ basis.T).T)[0]
            assert float((gradient @ rival).square().sum()) <= kept * (1 + 1e-6)


# What is protected stays protected


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}),
        (torch.optim.Adam, {"lr": 0.02}),
        (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    ],
)
def test_update_stays_in_the_residual_subspace_for_any_optimizer_over_ten_tasks(optimizer, options):
    method, model, names = keeplora(feature_energy=0.8), WideMLP(), ("fc1", "fc2", "out")
    widths = []
    for seed in range(10):
        task = NarrowTask(f"task{seed}", seed)
        adapted = method.before_task(model, task)
        protected = {name: basis.double() for name, basis in method.bases.items()}
        train(adapted, task, optimizer=optimizer, **options)
        before = {name: adapted.base_model.model.get_submodule(name).weight.detach().double() for name in names}
        model = method.after_task(adapted, task)
        for name, basis in protected.items():
            update = update_of(method.record, name, scaling=2 / 3)
            assert float((update @ basis).norm() / update.norm()) < 1e-5
            assert method.record.certificate[name].leak < 1e-5
            moved = model.get_submodule(name).weight.detach().double() - before[name]
            torch.testing.assert_close(moved, update, atol=1e-6, rtol=0)
            assert moved.norm() > 1e-3
            assert method.bases[name][:, : basis.shape[1]].double().equal(basis)
        widths.append({name: method.bases[name].shape[1] for name in names})
    for name in names:
        basis = method.bases[name].double()
        error = float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())
        assert error < 1e-5
        assert method.record.certificate[name].orthonormality < 1e-5
        assert widths[0][name] < widths[-1][name] < basis.shape[0], "tasks add, and leave room"


def test_outputs_of_an_earlier_task_move_less_than_without_protection():
    first, second = NarrowTask("first", 1), NarrowTask("second", 2)
    rows = torch.cat([rows for rows, _ in first.data])

    def moved(method):
        model = WideMLP()
        for task in (first, second):
            if task is second:
                before = model(rows).detach()
            adapted = method.before_task(model, task)
            train(adapted, task, epochs=4, lr=1.0)
            model = method.after_task(adapted, task)
        return float((model(rows).detach() - before).norm())

    plain = LoRAFT(MethodConfig(targets=MLP_OPTIONS["targets"], rank=3, alpha=2.0))
    assert moved(keeplora(feature_energy=0.999)) < 0.2 * moved(plain)


def test_certificate_counts_every_target_and_the_gradient_that_survives():
    method, task = keeplora(), VectorTask()
    gradients = mean_gradients(MLP(), task, ["fc1", "fc2", "out"])
    adapted = method.before_task(MLP(), task)
    bases = dict(method.bases)
    method.after_task(adapted, task)
    for name, basis in bases.items():
        layer = method.record.certificate[name]
        gradient, basis = gradients[name].double(), basis.double()
        residual = gradient - gradient @ basis @ basis.T
        assert method.record.surviving_gradient[name] == pytest.approx(
            float(residual.norm() / gradient.norm()), rel=1e-4
        )
        assert layer.protected_dims == basis.shape[1] + method.record.directions[name].shape[1]
        assert layer.protected_dims + layer.residual_dims == basis.shape[0]
        assert layer.rank == 3


def test_training_a_as_well_is_a_leak_and_an_error():
    method, task = keeplora(), VectorTask("leaky")
    adapted = method.before_task(MLP(), task)
    lora(adapted, "fc2")[0].requires_grad_(True)
    train(adapted, task, epochs=3, lr=0.5)
    with pytest.raises(ValueError, match=r"'leaky'.*'fc2' lies in the protected subspace"):
        method.after_task(adapted, task)


def test_an_update_that_is_not_finite_is_an_error_that_names_the_layer():
    method, task = keeplora(), VectorTask("diverged")
    adapted = method.before_task(MLP(), task)
    with torch.no_grad():
        lora(adapted, "fc2")[1][0, 0] = math.inf
    with pytest.raises(ValueError, match=r"'diverged'.*'fc2' is not finite"):
        method.after_task(adapted, task)


def test_a_task_whose_gradient_is_not_finite_leaves_the_model_as_it_was():
    model, task = MLP(), VectorTask("broken")
    task.data[0][0][0, 0] = math.nan
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'broken'"):
        keeplora().before_task(model, task)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# The start of b


def test_gradient_start_leaves_the_function_unchanged_and_sets_b_to_the_residual_gradients_factor():
    task = VectorTask()
    method = keeplora(b_start="gradient")
    adapted = method.before_task(MLP(), task)
    torch.testing.assert_close(logits(adapted, task), logits(MLP(), task), atol=1e-5, rtol=0)
    for name, gradient in mean_gradients(MLP(), task, ["fc1", "fc2", "out"]).items():
        a, b = (factor.detach().double() for factor in lora(adapted, name))
        basis = method.bases[name].double()
        residual = gradient.double() - gradient.double() @ basis @ basis.T
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ vh[:3], atol=1e-5, rtol=0)


def test_gradient_start_trains_like_zero_start_under_plain_sgd():
    ends = {}
    for start in ("zero", "gradient"):
        method, model = keeplora(b_start=start), MLP()
        for seed in (0, 1):
            task = VectorTask(f"task{seed}", seed)
            adapted = method.before_task(model, task)
            train(adapted, task, epochs=4)
            model = method.after_task(adapted, task)
        ends[start] = weights_of(model, ("fc1", "fc2", "out"))
    begin = weights_of(MLP(), ("fc1", "fc2", "out"))
    for name, wanted in ends["zero"].items():
        torch.testing.assert_close(ends["gradient"][name], wanted, atol=1e-5, rtol=0)
        assert (wanted - begin[name]).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["zero", "gradient"])
@pytest.mark.parametrize("kind", ["mlp", "clip", "llama"])
def test_saved_adapter_reloads_on_the_untouched_base_in_plain_peft(kind, start, tmp_path):
    build, make_task, options = FAMILIES[kind]
    method, task = method_for("keeplora", {**options, "b_start": start, "layer_scale": 0.5}), make_task("task", 0)
    adapted = method.before_task(build(), task)
    train(adapted, task, optimizer=torch.optim.AdamW, lr=0.02)
    wanted = logits(method.after_task(adapted, task), make_task("task", 0))
    folder = write_adapter(tmp_path / "adapter", method.record.adapter)
    reloaded = PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(logits(reloaded, make_task("task", 0)), wanted, atol=1e-5, rtol=1e-5)
    assert float((wanted - logits(build(), make_task("task", 0))).abs().max()) > 1e-2


# Options


def test_gradient_share_uses_the_first_batches_only():
    task, part = VectorTask(sizes=(8, 8, 5)), VectorTask(sizes=(8, 8, 5))
    part.data = part.data[:2]
    shared, wanted, whole = (
        lora(keeplora(gradient_share=share).before_task(MLP(), data), "fc2")[0]
        for share, data in ((0.5, task), (1.0, part), (1.0, task))
    )
    assert shared.equal(wanted)
    assert not torch.allclose(shared, whole, atol=1e-3)


def test_weight_energy_by_tower_sets_each_towers_basis():
    method = KeepLoRA(KeepLoRAConfig(rank=2, weight_energy={"vision": 0.8, "text": 0.0}))
    method.before_task(clip_model(), classification_task())
    for name, basis in method.bases.items():
        assert (basis.shape[1] > 0) == name.startswith("vision_model")


def test_a_layer_in_none_of_the_towers_is_an_error():
    with pytest.raises(ValueError, match="layer 'fc1' is in none of the towers vision, text"):
        keeplora(weight_energy={"vision": 0.85, "text": 0.2}).before_task(MLP(), VectorTask())


def test_layer_scale_grows_linearly_over_the_blocks_of_each_tower():
    names = [
        *(f"vision.layers.{i}.{part}" for i in (2, 4, 8, 16) for part in ("q", "v")),
        *(f"text.layers.{i}.q" for i in (0, 1)),
        "single.layers.5.q",
        "head",
    ]
    scales = layer_scales(names, 0.1)
    assert [scales[f"vision.layers.{i}.v"] for i in (2, 4, 8, 16)] == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert scales["vision.layers.4.q"] == scales["vision.layers.4.v"]
    assert [scales[f"text.layers.{i}.q"] for i in (0, 1)] == pytest.approx([0.1, 1.0])
    assert scales["single.layers.5.q"] == 1.0
    assert scales["head"] == 1.0
    assert set(layer_scales(names, 1.0).values()) == {1.0}


def test_layer_scale_reaches_the_saved_adapter_as_alpha_pattern():
    method, task = KeepLoRA(KeepLoRAConfig(rank=2, alpha=3.0, layer_scale=0.2)), classification_task()
    adapted = method.before_task(clip_model(layers=3), task)
    wanted = {0: 0.2, 1: 0.6, 2: 1.0}
    for tower in ("vision_model", "text_model"):
        for block, factor in wanted.items():
            layer = adapted.base_model.model.get_submodule(f"{tower}.encoder.layers.{block}.self_attn.q_proj")
            assert layer.scaling["default"] == pytest.approx(factor * 3.0 / 2)
    config = adapted.peft_config["default"]
    names = list(method.bases)
    assert len(names) == 24
    for name in names:
        alpha = config.alpha_pattern.get(name, config.lora_alpha)
        assert alpha == pytest.approx(3.0 * wanted[int(name.split(".layers.")[1][0])])


def test_a_rank_larger_than_the_room_shrinks_with_a_note_that_names_the_layer(caplog):
    # fc1 has 11 inputs; the first 6 hold 90 % of its weight's energy, so 5 are left. fc2 keeps 17 - 6 = 11.
    method = keeplora(rank=6, weight_energy=0.9, targets=("fc1", "fc2"))
    with caplog.at_level(logging.INFO, logger="keeplora"):
        adapted = method.before_task(MLP(), VectorTask("wide"))
    assert method.bases["fc1"].shape[1] == 6
    assert "'wide'" in caplog.text
    assert "fc1" in caplog.text
    assert "fc2" not in caplog.text
    (small, _), (large, _) = lora(adapted, "fc1"), lora(adapted, "fc2")
    assert (small.shape, large.shape) == ((5, 11), (6, 17))
    assert float((small.detach() @ method.bases["fc1"]).abs().max()) < 1e-5
    layers = adapted.base_model.model
    assert layers.fc1.scaling["default"] == pytest.approx(layers.fc2.scaling["default"])


def test_a_full_rank_that_fits_gives_no_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="keeplora"):
        keeplora().before_task(MLP(), VectorTask())
    assert caplog.text == ""


def test_an_exhausted_layer_is_left_alone_with_a_warning(caplog):
    method, task = keeplora(targets=("fc1", "fc2"), weight_energy={"fc1": 1.0, "fc2": 0.4}), VectorTask()
    with caplog.at_level(logging.WARNING, logger="keeplora"):
        adapted = method.before_task(MLP(), task)
    assert "left alone: fc1" in caplog.text
    assert not hasattr(adapted.base_model.model.fc1, "lora_A")
    train(adapted, task)
    model = method.after_task(adapted, task)
    assert model.fc1.weight.equal(MLP().fc1.weight)
    assert not model.fc2.weight.equal(MLP().fc2.weight)
    certificate = method.record.certificate["fc1"]
    assert (certificate.rank, certificate.leak, certificate.residual_dims) == (0, 0.0, 0)
    assert method.record.surviving_gradient["fc1"] < 1e-5


def test_nothing_left_in_any_layer_is_an_error():
    with pytest.raises(ValueError, match=r"'full': no layer has a residual direction left.*Lower weight_energy"):
        keeplora(targets=("fc1",), weight_energy=1.0).before_task(MLP(), VectorTask("full"))


def test_a_stream_that_fills_the_space_ends_in_that_error():
    method, model = keeplora(targets=("fc1",), feature_energy=1 - 1e-7), MLP()
    task = VectorTask("first")
    model = method.after_task(method.before_task(model, task), task)
    assert method.record.certificate["fc1"].residual_dims == 0
    assert method.record.certificate["fc1"].orthonormality < 1e-5
    with pytest.raises(ValueError, match="'second': no layer has a residual direction left"):
        method.before_task(model, VectorTask("second", 1))


def test_batch_mean_features_protect_other_directions():
    found = {}
    for features in ("second_moment", "batch_mean"):
        method, task = keeplora(features=features, feature_energy=0.9), VectorTask()
        method.after_task(method.before_task(MLP(), task), task)
        found[features] = method.bases["fc2"]
    rows = torch.tanh(MLP().fc1(torch.cat([rows for rows, _ in VectorTask().data]))).detach().double()

    def covered(basis):
        return float((rows @ basis.double()).square().sum() / rows.square().sum())

    assert covered(found["second_moment"]) > 0.89
    assert covered(found["batch_mean"]) < covered(found["second_moment"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": math.inf}, "alpha = inf"),
        ({"targets": ()}, "targets is empty"),
        ({"weight_energy": 1.5}, "weight_energy = 1.5"),
        ({"weight_energy": {"vision": 0.8, "text": -0.1}}, "weight_energy for 'text' = -0.1"),
        ({"feature_energy": 1.5}, "feature_energy = 1.5"),
        ({"feature_energy": math.nan}, "feature_energy = nan"),
        ({"layer_scale": 1.1}, "layer_scale = 1.1"),
        ({"gradient_share": 0.0}, "gradient_share = 0.0"),
        ({"gradient_share": 1.2}, "gradient_share = 1.2"),
        ({"b_start": "random"}, "b_start = 'random' is unknown; choose from zero, gradient"),
        ({"features": "mean"}, "features = 'mean' is unknown; choose from second_moment, last_epoch, batch_mean"),
        ({"classifier": "linear"}, "classifier = 'linear' is unknown; choose from none, cosine"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        KeepLoRAConfig(**options)


# The cosine classifier of KeepLoRA+


def image_features(model, task):
    features, labels = [], []
    with torch.no_grad():
        for batch in task.batches():
            pooled = model.get_image_features(pixel_values=batch["pixel_values"])
            features.append(getattr(pooled, "pooler_output", pooled).double())
            labels.append(batch["labels"])
    return F.normalize(torch.cat(features), dim=-1), torch.cat(labels)


def test_cosine_classifier_starts_from_class_means_and_adds_its_logits():
    model, task = clip_model(), classification_task()
    zero_shot = logits(model, classification_task()).double()
    method = KeepLoRA(KeepLoRAConfig(rank=2, classifier="cosine"))
    adapted = method.before_task(model, task)
    features, labels = image_features(clip_model(), classification_task())
    means = F.normalize(torch.stack([features[labels == label].mean(0) for label in range(3)]), dim=-1)
    torch.testing.assert_close(F.normalize(task.head.weight.double(), dim=-1), means, atol=1e-5, rtol=0)
    batch = next(iter(classification_task().batches()))
    of_batch, _ = image_features(clip_model(), type("One", (), {"batches": lambda self: [batch]})())
    wanted = zero_shot + model.logit_scale.exp().double() * of_batch @ means.T
    with torch.no_grad():
        torch.testing.assert_close(task.outputs(adapted.eval(), batch).double(), wanted, atol=1e-4, rtol=0)


def test_cosine_classifier_is_trained_and_kept_outside_the_model():
    model, task = clip_model(), classification_task()
    method = KeepLoRA(KeepLoRAConfig(rank=2, alpha=2.0, classifier="cosine"))
    adapted = method.before_task(model, task)
    start = task.head.weight.detach().clone()
    assert any(parameter is task.head.weight for parameter in adapted.parameters() if parameter.requires_grad)
    train(adapted, task)
    batch = next(iter(task.batches()))
    with torch.no_grad():
        wanted = task.outputs(adapted.eval(), batch)
    merged = method.after_task(adapted, task)
    assert not task.head.weight.equal(start)
    assert method.record.head["weight"].equal(task.head.weight)
    assert list(merged.state_dict()) == list(clip_model().state_dict())
    again = classification_task()
    again.load_head(method.record.head)
    with torch.no_grad():
        torch.testing.assert_close(again.outputs(merged, batch), wanted, atol=1e-5, rtol=1e-5)


def test_a_task_without_classes_has_no_cosine_classifier():
    with pytest.raises(ValueError, match=r"'vectors' has no classes.*classifier='none'"):
        keeplora(classifier="cosine").before_task(MLP(), VectorTask())


# Replay


@pytest.mark.parametrize("kind", ["mlp", "clip", "llama"])
def test_replay_reproduces_model_and_bases_from_what_was_recorded(kind, tmp_path):
    build, make_task, options = FAMILIES[kind]
    method, model, records = method_for("keeplora", options), build(), []
    for seed in (0, 1):
        task = make_task(f"task{seed}", seed)
        adapted = method.before_task(model, task)
        train(adapted, task)
        model = method.after_task(adapted, task)
        records.append((method.record, write_adapter(tmp_path / str(seed), method.record.adapter)))
    other, replayed = method_for("keeplora", options), build()
    for record, folder in records:
        replayed = other.replay(replayed, record, folder)
    for (name, value), again in zip(model.state_dict().items(), replayed.state_dict().values(), strict=True):
        assert value.equal(again), name
    for name, basis in method.bases.items():
        assert basis.equal(other.bases[name])
    assert all(parameter.requires_grad for parameter in replayed.parameters())


# Other trainers


@pytest.mark.slow
def test_a_causal_language_model_is_trained_by_transformers_trainer(tmp_path):
    model, method, task = llama_model(), method_for("keeplora", {"weight_energy": 0.4}), TokenTask()
    examples = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        for batch in task.data
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    adapted = method.before_task(model, task)
    start = float(task.loss(adapted, task.data[0]).detach())
    protected = dict(method.bases)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=adapted, args=arguments, train_dataset=examples).train()
    merged = method.after_task(adapted, task)
    assert isinstance(merged, nn.Module)
    assert float(task.loss(merged, task.data[0]).detach()) < start - 0.01
    for name, basis in protected.items():
        assert method.record.certificate[name].leak < 1e-5
        assert basis.shape[1] < method.bases[name].shape[1]


@pytest.mark.slow
def test_a_dual_encoder_is_trained_by_transformers_trainer_with_the_tasks_loss(tmp_path):
    class TaskTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return task.loss(model, inputs)

    model, method, task = clip_model(), method_for("keeplora", {}), classification_task()
    items = [next(iter(classification_task(batch_size=15).batches()))]
    examples = [{key: value[i] for key, value in items[0].items()} for i in range(15)]
    adapted = method.before_task(model, task)
    start = float(task.loss(adapted, items[0]).detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=6, learning_rate=0.02, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        remove_unused_columns=False,
    )  # fmt: skip
    TaskTrainer(model=adapted, args=arguments, train_dataset=examples).train()
    merged = method.after_task(adapted, task)
    assert float(task.loss(merged, items[0]).detach()) < start - 0.01
    assert max(layer.leak for layer in method.record.certificate.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_same_from_batches_in_parts(name, monkeypatch):
    learned = []
    for images in (100, 4):
        monkeypatch.setattr("keeplora.models.dual_encoder.PIXELS_AT_ONCE", images * 3 * 16 * 16)
        method, model = method_for(name, {}), clip_model()
        for task in method.schedule([classification_task("first", 0), classification_task("second", 1)]):
            adapted = method.before_task(model, task)
            fit(adapted, task, TrainConfig(epochs=2), penalty=method.penalty)
            model = method.after_task(adapted, task)
        learned.append(logits(model, classification_task("second", 1)))
    whole, cut = learned
    if name != "zero_shot":
        assert (whole - logits(clip_model(), classification_task("second", 1))).abs().max() > 1e-2
    torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-3)
