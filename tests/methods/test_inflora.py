import logging

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from keeplora.layers import lora
from keeplora.methods.base import MethodConfig
from keeplora.methods.baselines import LoRAFT
from keeplora.methods.inflora import InfLoRA, InfLoRAConfig
from tiny import MLP, NarrowTask, TokenTask, VectorTask, WideMLP, llama_model, train, write_adapter

NAMES = ("fc1", "fc2", "out")


def inflora(**options):
    return InfLoRA(InfLoRAConfig(**{"targets": NAMES, "rank": 3, "alpha": 2.0, **options}))


def learn(method, model, task, **options):
    adapted = method.before_task(model, task)
    train(adapted, task, **options)
    return method.after_task(adapted, task)


def inputs_of(model, task):
    """Return every layer's inputs over a task, `[n, d_in]` in float64, one example at a time."""
    inputs = {name: [] for name in NAMES}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0][0]))
        for name in NAMES
    ]
    with torch.no_grad():
        for rows, _ in task.batches():
            for row in rows:
                model(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows).double().numpy() for name, rows in inputs.items()}


def top(rows, basis, k):
    """Return the top k right singular vectors of rows outside a basis, `[d_in, k]`: V of the SVD of the residual."""
    return np.linalg.svd(rows - rows @ basis @ basis.T)[2][:k].T


def test_a_spans_the_top_of_the_new_tasks_inputs_outside_those_of_earlier_tasks():
    method, model = inflora(feature_energy=0.9), WideMLP()
    for seed in range(3):
        task = NarrowTask(f"task{seed}", seed)
        inputs, bases = inputs_of(model, task), {name: basis.double().numpy() for name, basis in method.bases.items()}
        adapted = method.before_task(model, task)
        for name, layer in lora.lora_layers(adapted).items():
            a = layer.lora_A["default"].weight.detach().double().numpy()
            basis = bases.get(name, np.zeros((a.shape[1], 0)))
            assert not layer.lora_A["default"].weight.requires_grad
            assert not layer.lora_B["default"].weight.any()
            np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-5)
            assert np.abs(a @ basis).max(initial=0.0) < 1e-5
            assert subspace_angles(a.T, top(inputs[name], basis, 3)).max() < 1e-2
        train(adapted, task)
        model = method.after_task(adapted, task)


def test_the_memory_grows_by_the_fewest_directions_that_cover_the_share():
    method, model = inflora(energy="inputs", feature_energy=0.8, last_feature_energy=0.8), WideMLP()
    for seed in range(3):
        task = NarrowTask(f"task{seed}", seed)
        before = {name: basis.double().numpy() for name, basis in method.bases.items()}
        model = learn(method, model, task)
        for name, rows in inputs_of(model, task).items():
            basis, added = method.bases[name].double().numpy(), method.record.directions[name].shape[1]
            covered = np.sum((rows @ basis) ** 2) / np.sum(rows**2)
            assert covered >= 0.8 - 1e-6
            old = before.get(name, basis[:, :0])
            assert basis.shape[1] == old.shape[1] + added
            if added:
                fewer = np.concatenate([old, top(rows, old, added - 1)], axis=1)
                assert np.sum((rows @ fewer) ** 2) / np.sum(rows**2) < 0.8


def test_the_squared_rule_is_the_share_of_the_squared_spectrum_of_the_projected_gram():
    method, model = inflora(feature_energy=0.8, last_feature_energy=0.8), WideMLP()
    for seed in range(3):
        task = NarrowTask(f"task{seed}", seed)
        before = {name: basis.double().numpy() for name, basis in method.bases.items()}
        model = learn(method, model, task)
        for name, rows in inputs_of(model, task).items():
            gram, old = rows.T @ rows, before.get(name, np.zeros((rows.shape[1], 0)))
            energies = np.linalg.svd(gram - old @ old.T @ gram)[1] ** 2
            total = np.sum(np.linalg.svd(gram)[1] ** 2)
            covered = (total - energies.sum() + np.concatenate([[0.0], energies.cumsum()])) / total
            assert method.record.directions[name].shape[1] == int(np.sum(covered < 0.8))


def test_outputs_of_earlier_tasks_stay_when_all_their_inputs_are_protected():
    first, second = NarrowTask("first", 1), NarrowTask("second", 2)
    rows = torch.cat([rows for rows, _ in first.data])

    def changes(method):
        model = learn(method, WideMLP(), first, epochs=4)
        inputs, before = inputs_of(model, first), model(rows).detach()
        weights = {name: model.get_submodule(name).weight.detach().double() for name in NAMES}
        model = learn(method, model, second, epochs=4, lr=1.0)
        updates = {name: model.get_submodule(name).weight.detach().double() - weights[name] for name in NAMES}
        leaks = {
            name: float((torch.tensor(inputs[name]) @ update.T).norm() / update.norm())
            / float(np.linalg.norm(inputs[name], 2))
            for name, update in updates.items()
        }
        return leaks, float((model(rows).detach() - before).norm())

    leaks, moved = changes(inflora(energy="inputs", feature_energy=1.0))
    plain_leaks, plain = changes(LoRAFT(MethodConfig(targets=NAMES, rank=3, alpha=2.0)))
    assert leaks["fc1"] < 1e-5, "these inputs lie in four directions: nothing is left of them"
    assert max(leaks.values()) < 2e-3, "inputs are covered up to rounding"
    assert min(plain_leaks.values()) > 0.02
    assert moved < 2e-3 * plain


def test_a_full_share_protects_the_directions_of_the_inputs_and_not_those_of_rounding_noise():
    method = inflora(feature_energy=1.0)
    for seed in range(5):
        learn(method, WideMLP(), NarrowTask(f"task{seed}", seed), epochs=1)
        assert method.bases["fc1"].shape[1] == 4 * (seed + 1)


def test_certificate_says_that_no_update_leaked():
    method, model = inflora(feature_energy=0.9), WideMLP()
    for seed in range(3):
        model = learn(method, model, NarrowTask(f"task{seed}", seed))
        for name, layer in method.record.certificate.items():
            assert layer.leak < 1e-5
            assert layer.orthonormality < 1e-5
            assert layer.protected_dims == method.bases[name].shape[1]
            assert layer.rank == 3


def test_the_share_rises_linearly_over_the_planned_tasks_and_stays_without_a_plan():
    method, tasks = inflora(feature_energy=0.5, last_feature_energy=0.9), [VectorTask(str(i), i) for i in range(4)]
    assert method.schedule(tasks) is tasks
    shares, model = [], MLP()
    for task in tasks[:3]:
        shares.append(method.share)
        model = learn(method, model, task, epochs=1)
    assert shares == pytest.approx([0.5, 0.6, 0.7])
    assert method.share == pytest.approx(0.8), "the last task stays one step below the end, as in the released code"
    unplanned = inflora(feature_energy=0.5, last_feature_energy=0.9)
    learn(unplanned, MLP(), tasks[0], epochs=1)
    assert unplanned.share == 0.5


def test_a_resumed_stream_goes_on_bit_by_bit(tmp_path):
    tasks = [NarrowTask(f"task{seed}", seed) for seed in range(3)]
    method, model = inflora(feature_energy=0.6), WideMLP()
    method.schedule(tasks)
    records = []
    for task in tasks:
        model = learn(method, model, task)
        records.append(method.record)
    resumed, again = inflora(feature_energy=0.6), WideMLP()
    resumed.schedule(tasks)
    for index, record in enumerate(records[:2]):
        again = resumed.replay(again, record, write_adapter(tmp_path / str(index), record.adapter))
    again = learn(resumed, again, tasks[2])
    assert resumed.record.adapter.files() == records[2].adapter.files()
    assert resumed.share == method.share
    for name, basis in method.bases.items():
        assert resumed.bases[name].equal(basis)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name


def test_the_rank_shrinks_to_the_free_directions_at_the_same_scaling_and_says_so(caplog):
    method = inflora(rank=6, alpha=3.0)
    with caplog.at_level(logging.INFO):
        adapted = method.before_task(WideMLP(), NarrowTask())
        method.abandon(adapted)
        adapted = method.before_task(WideMLP(), NarrowTask())
    layers = lora.lora_layers(adapted)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"fc1": 4, "fc2": 6, "out": 6}
    assert {layer.scaling["default"] for layer in layers.values()} == {0.5}
    (told,) = caplog.records
    assert told.levelname == "INFO", "harmless"
    assert "1 of 3 layers have fewer directions to learn with than rank 6, and take these, as in" in told.getMessage()
    assert told.getMessage().endswith("fc1 (4)")


def test_layers_without_room_are_left_alone_until_none_has_any():
    method = inflora()
    learn(method, MLP(), VectorTask(), epochs=1)
    method.bases |= {name: torch.eye(MLP().get_submodule(name).in_features) for name in ("fc1", "fc2")}
    assert set(lora.lora_layers(method.before_task(MLP(), VectorTask()))) == {"out"}
    method.bases["out"] = torch.eye(13)
    with pytest.raises(
        ValueError, match=r"'full': no layer has .*Lower weight_energy or feature_energy, or add targets"
    ):
        method.before_task(MLP(), VectorTask("full"))


def test_padding_rows_never_enter_the_memory():
    class Padded(TokenTask):
        def batches(self):
            return [
                batch | {"input_ids": batch["input_ids"] + 7 * (1 - batch["attention_mask"])} for batch in self.data
            ]

    method, other = (InfLoRA(InfLoRAConfig(rank=3)) for _ in range(2))
    plain = lora.factors_of(method.before_task(llama_model(), TokenTask()))
    padded = lora.factors_of(other.before_task(llama_model(), Padded()))
    for name, (a, _) in plain.items():
        assert subspace_angles(a.T.numpy(), padded[name][0].T.numpy()).max() < 1e-3


def test_the_defaults_are_the_papers():
    config = InfLoRAConfig()
    assert (config.rank, config.alpha, config.targets) == (10, 10.0, ("k_proj", "v_proj"))
    assert (config.feature_energy, config.last_feature_energy) == (0.95, 1.0)


@pytest.mark.parametrize("name", ["feature_energy", "last_feature_energy"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_outside_zero_to_one_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"^{name} = .*: Input should be"):
        InfLoRAConfig(**{name: value})
