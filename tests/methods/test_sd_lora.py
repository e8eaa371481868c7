import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from keeplora.layers import lora
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import LoRAFT
from keeplora.methods.sd_lora import SDLoRA, SDLoRAConfig
from tiny import NarrowTask, VectorTask, WideMLP, classification_task, clip_model, train, write_adapter

NAMES = ("fc1", "fc2", "out")
R, SCALING = 3, 2 / 3


def sd_lora(**options):
    return SDLoRA(SDLoRAConfig(**{"targets": NAMES, "rank": R, "alpha": 2.0, **options}))


def learn(method, model, task, *, seed=0, **options):
    torch.manual_seed(seed)
    adapted = method.before_task(model, task)
    train(adapted, task, **options)
    return method.after_task(adapted, task)


def learn_stream(method, model, num_tasks):
    records = []
    for seed in range(num_tasks):
        model = learn(method, model, NarrowTask(f"task{seed}", seed), seed=seed, epochs=3)
        records.append(method.record)
    return model, records


def blocks(record, name):
    """Return what each block of a task's saved adapter adds to a layer's weight, one block at a time, in float64."""
    a, b = (record.adapter.weights[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return [SCALING * b[:, i : i + R] @ a[i : i + R] for i in range(0, len(a), R)]


def test_one_task_is_lora_bit_by_bit():
    for build, task, targets in ((WideMLP, NarrowTask(), NAMES), (clip_model, classification_task(), ("q_proj",))):
        options = {"targets": targets, "rank": R, "alpha": 2.0}
        model = learn(SDLoRA(SDLoRAConfig(**options)), build(), task)
        fresh = NarrowTask() if build is WideMLP else classification_task()
        plain = learn(LoRAFT(MethodConfig(**options)), build(), fresh)
        for name, value in plain.state_dict().items():
            assert model.state_dict()[name].equal(value), name


def reference_stream(num_tasks):
    """Learn the stream with dense matrices: `W0 + sum_k alpha_k D_k + s b a` with all alphas, a and b by SGD."""
    base = {name: value.detach().double() for name, value in WideMLP().named_parameters()}
    model, directions, alphas = WideMLP().double(), {name: [] for name in NAMES}, {name: [] for name in NAMES}
    weights = {}
    for seed in range(num_tasks):
        fresh = WideMLP()
        torch.manual_seed(seed)
        fresh = lora.attach(fresh, dict.fromkeys(NAMES, R * (seed + 1)), dict.fromkeys(NAMES, 1.0))
        starts = {name: a[-R:].double() for name, (a, _) in lora.factors_of(fresh).items()}
        a = {name: start.requires_grad_() for name, start in starts.items()}
        b = {name: torch.zeros(len(base[f"{name}.weight"]), R).double().requires_grad_() for name in NAMES}
        scales = {name: [alpha.detach().requires_grad_() for alpha in alphas[name]] for name in NAMES}
        trained = [*a.values(), *b.values(), *(alpha for name in NAMES for alpha in scales[name])]

        def weight(name, a=a, b=b, scales=scales):
            total = base[f"{name}.weight"] + SCALING * b[name] @ a[name]
            for alpha, direction in zip(scales[name], directions[name], strict=True):
                total = total + alpha * direction
            return total

        for _ in range(3):
            for rows, labels in NarrowTask("task", seed).data:
                outputs = functional_call(model, base | {f"{n}.weight": weight(n) for n in NAMES}, rows.double())
                gradients = torch.autograd.grad(F.cross_entropy(outputs, labels), trained)
                with torch.no_grad():
                    for parameter, gradient in zip(trained, gradients, strict=True):
                        parameter -= 0.1 * gradient
        weights = {name: weight(name).detach() for name in NAMES}
        for name in NAMES:
            product = (SCALING * b[name] @ a[name]).detach()
            directions[name].append(product / product.norm())
            alphas[name] = [*scales[name], product.norm()]
    return weights, {name: torch.stack(alphas[name]).detach() for name in NAMES}


def test_three_tasks_follow_the_dense_sum_of_scaled_directions_and_the_new_pair():
    method = sd_lora()
    model, _ = learn_stream(method, WideMLP(), 3)
    weights, alphas = reference_stream(3)
    for name in NAMES:
        torch.testing.assert_close(model.get_submodule(name).weight.double(), weights[name], atol=2e-5, rtol=0)
        torch.testing.assert_close(method.magnitudes[name].double(), alphas[name], atol=2e-5, rtol=1e-4)


def test_the_merged_weight_is_the_sum_of_magnitudes_times_directions():
    method, start = sd_lora(), WideMLP()
    model, records = learn_stream(method, WideMLP(), 3)
    for name in NAMES:
        new = [blocks(record, name)[-1] for record in records]
        directions = [product / product.norm() for product in new]
        total = start.get_submodule(name).weight.detach().double()
        for alpha, direction in zip(method.magnitudes[name].double(), directions, strict=True):
            total = total + alpha * direction
        torch.testing.assert_close(model.get_submodule(name).weight.double(), total, atol=1e-5, rtol=0)
        a, b = method.directions[name]
        for k, direction in enumerate(directions):
            held = b[:, k * R : (k + 1) * R] @ a[k * R : (k + 1) * R]
            torch.testing.assert_close(held.double(), direction, atol=1e-6, rtol=0)


def test_earlier_directions_stay_while_their_magnitudes_move():
    method = sd_lora()
    _, records = learn_stream(method, WideMLP(), 3)
    for name in NAMES:
        learned = [blocks(record, name)[-1] for record in records]
        for t, record in enumerate(records):
            assert len(blocks(record, name)) == t + 1
            assert len(record.state[f"{name}.magnitudes"]) == t + 1
            for k, change in enumerate(blocks(record, name)[:-1]):
                direction = learned[k] / learned[k].norm()
                moved = record.state[f"{name}.magnitudes"][k] - records[t - 1].state[f"{name}.magnitudes"][k]
                assert abs(moved) > 1e-4
                torch.testing.assert_close(change, float(moved) * direction, atol=1e-6, rtol=0)


def test_a_later_task_starts_from_the_same_function_and_trains_only_the_new_pair_and_one_number_a_direction():
    method, task = sd_lora(), NarrowTask("next", 9)
    model, _ = learn_stream(method, WideMLP(), 2)
    rows = task.data[0][0]
    wanted = model(rows).detach()
    adapted = method.before_task(model, task)
    assert adapted(rows).equal(wanted)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    sizes = [(layer.in_features, layer.out_features) for layer in lora.lora_layers(adapted).values()]
    assert sum(p.numel() for p in trained.values()) == sum(R * (d_in + d_out) + 2 for d_in, d_out in sizes)
    update = {name: b @ a for name, (a, b) in lora.factors_of(adapted).items()}
    assert not any(value.any() for value in update.values())
    train(adapted, task)
    trained_outputs = adapted(rows).detach()
    before = {name: b @ a for name, (a, b) in lora.factors_of(adapted).items()}
    torch.testing.assert_close(method.after_task(adapted, task)(rows), trained_outputs, atol=1e-5, rtol=0)
    for name, (a, b) in method.record.adapter.factors().items():
        torch.testing.assert_close(b @ a, before[name], atol=1e-6, rtol=0)


def test_a_resumed_stream_goes_on_bit_by_bit(tmp_path):
    method = sd_lora()
    model, records = learn_stream(method, WideMLP(), 3)
    resumed, again = sd_lora(), WideMLP()
    for index, record in enumerate(records[:2]):
        again = resumed.replay(again, record, write_adapter(tmp_path / str(index), record.adapter))
    again = learn(resumed, again, NarrowTask("task2", 2), seed=2, epochs=3)
    assert resumed.record.adapter.files() == records[2].adapter.files()
    for name in NAMES:
        assert resumed.magnitudes[name].equal(method.magnitudes[name])
        for ours, theirs in zip(resumed.directions[name], method.directions[name], strict=True):
            assert ours.equal(theirs)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name


def test_a_layer_that_learned_nothing_has_a_direction_of_nothing():
    method = sd_lora()
    model = learn(method, WideMLP(), NarrowTask(), epochs=0)
    model = learn(method, model, NarrowTask("second", 1))
    for name in NAMES:
        assert method.magnitudes[name][0] == 0
        assert not method.directions[name][1][:, :R].any()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_defaults_are_the_papers():
    config = SDLoRAConfig()
    assert (config.rank, config.alpha, config.targets) == (10, 10.0, ("q_proj", "v_proj"))


def test_bad_options_are_errors():
    with pytest.raises(ValueError, match="rank = 0: "):
        SDLoRAConfig(rank=0)
    with pytest.raises(ValueError, match="named w_q; set targets to some of: fc1, fc2, out"):
        sd_lora(targets=("w_q",)).before_task(WideMLP(), VectorTask())
