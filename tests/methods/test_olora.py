import pytest
import torch

from keeplora.layers import lora
from keeplora.methods.olora import OLoRA, OLoRAConfig
from penalties import MLP, NAMES, VectorTask, learn, penalised, require_an_equal_resumed_run, started


def olora(**options):
    return OLoRA(OLoRAConfig(**{"targets": NAMES, "rank": 3, "alpha": 2.0, **options}))


def double_sum(earlier, a, size):
    """Sum over earlier tasks and entries of `A_i^T A_t`, one at a time."""
    return sum(size(float(row @ new)) for a_i in earlier for row in a_i.double() for new in a.double())


def factors(adapted):
    return {name: layer.lora_A["default"].weight.detach() for name, layer in lora.lora_layers(adapted).items()}


def test_there_is_no_penalty_on_the_first_task():
    method = olora()
    assert method.penalty(started(method, MLP())) is None


@pytest.mark.parametrize(("overlap", "size"), [("squared", lambda x: x**2), ("absolute", abs)])
def test_penalty_is_the_double_sum_over_earlier_tasks_and_entries(overlap, size):
    method = olora(lambda_1=0.7, overlap=overlap)
    records, model = learn(method, MLP(), seeds=(0, 1))
    adapted = started(method, model)
    wanted = 0.7 * sum(
        double_sum([record.adapter.factors()[name][0] for record in records], a, size)
        for name, a in factors(adapted).items()
    )
    assert wanted > 0
    assert float(method.penalty(adapted).detach()) == pytest.approx(wanted, rel=1e-5)


def test_penalty_is_zero_exactly_where_the_factors_are_orthogonal():
    method = olora()
    _, model = learn(method, MLP(), seeds=(0,))
    method.earlier = {name: torch.eye(a.shape[1])[:3] for name, a in method.earlier.items()}
    adapted = started(method, model)
    for layer in lora.lora_layers(adapted).values():
        layer.lora_A["default"].weight.data = torch.eye(layer.in_features)[3:6].clone()
    assert float(method.penalty(adapted).detach()) == 0
    for layer in lora.lora_layers(adapted).values():
        layer.lora_A["default"].weight.data[0, 0] = 0.1
    assert float(method.penalty(adapted).detach()) == pytest.approx(0.5 * 3 * 0.01, rel=1e-5)


def test_the_norms_of_both_factors_are_added_from_the_first_task_on():
    method = olora(lambda_2=0.3)
    adapted = penalised(started(method, MLP()))
    layers = lora.lora_layers(adapted).values()
    wanted = sum(
        float(side["default"].weight.detach().norm()) for layer in layers for side in (layer.lora_A, layer.lora_B)
    )
    assert float(method.penalty(adapted).detach()) == pytest.approx(0.3 * wanted, rel=1e-5)


def test_norms_at_the_start_have_a_gradient():
    method = olora(lambda_2=0.3)
    adapted = started(method, MLP())
    method.penalty(adapted).backward()
    assert all(torch.isfinite(p.grad).all() for p in adapted.parameters() if p.requires_grad)


def test_descending_the_penalty_turns_a_away_from_the_earlier_ones():
    method = olora()
    _, model = learn(method, MLP(), seeds=(0,))
    adapted = started(method, model)
    before = float(method.penalty(adapted).detach())
    steps = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(50):
        steps.zero_grad()
        method.penalty(adapted).backward()
        steps.step()
    assert float(method.penalty(adapted).detach()) < before / 10


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    one, other = require_an_equal_resumed_run(olora, tmp_path)
    for name, earlier in one.earlier.items():
        assert earlier.shape[0] == 9
        assert earlier.equal(other.earlier[name])


@pytest.mark.parametrize("name", ["lambda_1", "lambda_2"])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_a_bad_weight_is_an_error(name, value):
    with pytest.raises(ValueError, match=rf"{name} = .*: Input should be"):
        OLoRAConfig(**{name: value})


def test_an_unknown_overlap_is_an_error():
    with pytest.raises(ValueError, match="overlap = 'cubed' is unknown; choose from squared, absolute"):
        OLoRAConfig(overlap="cubed")


def test_a_task_leaves_no_layer_behind():
    method = olora()
    learn(method, MLP(), seeds=(0,), task=VectorTask)
    assert method.layers == {}
