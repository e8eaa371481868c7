import pytest
import torch

from keeplora.layers.fisher import fisher_diagonals
from keeplora.methods.ewc import EWC, EWCConfig
from keeplora.runs.directory import RunDirectory
from penalties import MLP, NAMES, VectorTask, learn, penalised, require_an_equal_resumed_run, started, updates


def ewc(**options):
    return EWC(EWCConfig(**{"targets": NAMES, "rank": 3, "alpha": 2.0, "strength": 2.0, **options}))


def test_there_is_no_penalty_on_the_first_task():
    method = ewc()
    assert method.penalty(started(method, MLP())) is None


def test_penalty_is_the_sum_over_weights_of_fisher_times_squared_update():
    method = ewc(strength=6.0)
    _, model = learn(method, MLP(), seeds=(0,))
    adapted = penalised(started(method, model))
    wanted = 0.0
    for name, update in updates(adapted).items():
        fisher = method.fishers[name]
        assert fisher.shape == update.shape
        wanted += sum(
            float(fisher[i, j]) * float(update[i, j]) ** 2
            for i, j in torch.cartesian_prod(*map(torch.arange, fisher.shape))
        )
    assert wanted > 0
    assert float(method.penalty(adapted).detach()) == pytest.approx(6.0 / 2 * wanted, rel=1e-5)


def test_penalty_is_that_of_the_distance_from_the_merged_weights():
    method = ewc()
    _, model = learn(method, MLP(), seeds=(0,))
    anchor = {name: model.get_submodule(name).weight.detach().double().clone() for name in NAMES}
    adapted = penalised(started(method, model))
    before = float(method.penalty(adapted).detach())
    fishers = dict(method.fishers)
    merged = method.after_task(adapted, VectorTask(seed=9))
    moved = {name: merged.get_submodule(name).weight.detach().double() - anchor[name] for name in NAMES}
    assert before == pytest.approx(sum(float((fishers[name] * moved[name] ** 2).sum()) for name in NAMES), rel=1e-4)


@pytest.mark.parametrize("decay", [1.0, 0.25, 0.0])
def test_fishers_of_the_tasks_are_summed_with_decay(decay):
    method, model, wanted = ewc(decay=decay), MLP(), dict.fromkeys(NAMES, 0.0)
    for seed in (0, 1, 2):
        _, model = learn(method, model, seeds=(seed,))
        fresh = fisher_diagonals(model, VectorTask(f"task{seed}", seed), list(NAMES))
        wanted = {name: decay * wanted[name] + fresh[name].double() for name in NAMES}
    for name in NAMES:
        torch.testing.assert_close(method.fishers[name].double(), wanted[name], rtol=1e-5, atol=0)
        assert method.record.state[name].equal(method.fishers[name])


def test_a_weight_without_fisher_is_free():
    method = ewc()
    _, model = learn(method, MLP(), seeds=(0,))
    method.fishers = {name: torch.zeros_like(fisher) for name, fisher in method.fishers.items()}
    assert float(method.penalty(penalised(started(method, model))).detach()) == 0


def test_a_stronger_penalty_moves_the_important_weights_less():
    moved = []
    for strength in (0.0, 3000.0):
        method = ewc(strength=strength)
        _, model = learn(method, MLP(), seeds=(0,))
        fishers = dict(method.fishers)
        (record,), _ = learn(method, model, seeds=(1,))
        factors = record.adapter.factors()
        moved.append(sum(float((fishers[name] * (b @ a) ** 2).sum()) for name, (a, b) in factors.items()))
    assert 0 < moved[1] < moved[0] / 2


def test_penalty_is_in_full_precision_inside_a_region_of_mixed_precision():
    method = ewc()
    _, model = learn(method, MLP(), seeds=(0,))
    adapted = penalised(started(method, model))
    wanted = method.penalty(adapted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.penalty(adapted).equal(wanted)


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    one, other = require_an_equal_resumed_run(ewc, tmp_path)
    for name, fisher in one.fishers.items():
        assert fisher.equal(other.fishers[name])


def test_the_ledger_gives_the_fishers_back(tmp_path):
    method = ewc()
    learn(method, MLP(), seeds=(0,))
    manifest = {"config": {"method": "ewc", "benchmark": "b", "model": "m", "seed": 0, "more": [],
                           "evaluation": "test", "tasks": {}, "train": {}, "options": {}}, "tasks": ["task0"],
                "tasks_finished": 0, "files": {}, "start": {}, "zero_shot": [0.1], "model_digest": "x"}  # fmt: skip
    directory = RunDirectory(tmp_path, manifest)
    directory.add_task(method.record, {"name": "task0", "scores": [0.5], "phases": {}}, None)
    read, _ = directory.record(0)
    assert set(read.state) == set(NAMES)
    assert all(value.equal(method.fishers[name]) for name, value in read.state.items())


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_a_bad_strength_is_an_error(strength):
    with pytest.raises(ValueError, match=r"strength = .*: Input should be"):
        EWCConfig(strength=strength)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_bad_decay_is_an_error(decay):
    with pytest.raises(ValueError, match=r"decay = .*: Input should be"):
        EWCConfig(decay=decay)
