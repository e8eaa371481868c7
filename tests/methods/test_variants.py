import dataclasses

import pytest
import torch

import tiny
from keeplora.config import parse
from keeplora.layers.gradients import mean_gradients
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.methods.registry import METHODS, find_method, known_methods, method_behind, settings_of, variants
from keeplora.runs.config import RunConfig
from keeplora.subspace import linear_algebra as linalg
from keeplora.subspace.protected import new_directions
from tiny import MLP, VectorTask, clip_model, train

NAMES = ("fc1", "fc2", "out")
OPTIONS = {"targets": NAMES, "weight_energy": 0.4, "feature_energy": 0.6, "rank": 3, "alpha": 2.0}


def learn(model, task, **options):
    method = KeepLoRA(KeepLoRAConfig(**{**OPTIONS, **options}))
    adapted = method.before_task(model, task)
    return method, adapted


def a_of(adapted, name):
    return adapted.base_model.model.get_submodule(name).lora_A["default"].weight


@pytest.mark.parametrize("name", variants())
def test_every_variant_is_a_method_with_other_options_and_a_description(name):
    kind, options = find_method(name)
    assert kind is METHODS[method_behind(name)]
    config = parse(kind.Config, options, source=name)
    assert config != kind.Config(), "a variant differs from its method"
    assert variants()[name]["description"].endswith(".")
    assert set(variants()[name]) <= {"method", "description", "options", "inherits_settings"}
    assert RunConfig(method=name).options == config
    assert settings_of(name) in (name, method_behind(name))


def test_names_of_methods_and_variants_differ():
    assert len(set(known_methods())) == len(known_methods()) == len(METHODS) + len(variants())


def test_a_variants_options_go_before_the_benchmarks_for_its_method_and_flags_before_them():
    plain, ablated = (tiny.resolved("mini", name).options for name in ("keeplora", "keeplora_no_features"))
    assert ablated == dataclasses.replace(plain, feature_energy=0.0)
    train_of = [tiny.resolved("mini", name).train for name in ("keeplora", "keeplora_no_features")]
    assert train_of[0] == train_of[1]
    given = tiny.resolved("mini", "keeplora_plus", {"options": {"rank": 5}}).options
    assert (given.classifier, given.rank) == ("cosine", 5)


def test_without_the_principal_subspace_the_gradients_own_top_is_learned():
    task = VectorTask()
    gradients = mean_gradients(MLP(), task, list(NAMES))
    _, adapted = learn(MLP(), task, weight_energy=0.0)
    for name in NAMES:
        _, _, vh = torch.linalg.svd(gradients[name].double(), full_matrices=False)
        cosines = torch.linalg.svdvals(a_of(adapted, name).detach().double() @ vh[:3].T)
        assert float(cosines.min()) > 1 - 1e-4


def test_without_feature_directions_a_task_protects_nothing():
    method, adapted = learn(MLP(), VectorTask(), feature_energy=0.0)
    protected = {name: basis.shape[1] for name, basis in method.bases.items()}
    train(adapted, VectorTask())
    method.after_task(adapted, VectorTask())
    assert {name: basis.shape[1] for name, basis in method.bases.items()} == protected


def test_random_a_is_orthonormal_in_the_residual_space_and_new_for_every_task():
    model, found = MLP(), []
    method = KeepLoRA(KeepLoRAConfig(**{**OPTIONS, "a_start": "random"}))
    for seed in (0, 1):
        adapted = method.before_task(model, VectorTask(seed=seed))
        for name in NAMES:
            a = a_of(adapted, name).detach()
            assert not a_of(adapted, name).requires_grad
            assert float((a @ method.bases[name]).abs().max()) < 1e-5
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)
        found.append(a_of(adapted, "fc2").detach().clone())
        train(adapted, VectorTask(seed=seed))
        model = method.after_task(adapted, VectorTask(seed=seed))
    _, gradient = learn(MLP(), VectorTask())
    assert float((found[0] - a_of(gradient, "fc2")).abs().max()) > 0.1
    rows = min(len(a) for a in found)
    assert rows > 0
    assert float((found[0][:rows] - found[1][:rows]).abs().max()) > 0.1


def test_a_trained_a_leaves_the_residual_space_and_the_certificate_says_how_far():
    method, adapted = learn(MLP(), VectorTask(), a_training="trained")
    assert a_of(adapted, "fc1").requires_grad
    train(adapted, VectorTask(), epochs=5, lr=0.5)
    method.after_task(adapted, VectorTask())
    assert max(layer.leak for layer in method.record.certificate.values()) > 1e-3


def test_the_releases_principal_directions_are_those_of_the_output_side():
    model = clip_model()
    method = KeepLoRA(KeepLoRAConfig(rank=2, weight_side="output", weight_energy=0.5))
    method.protect(model)
    for name, basis in method.bases.items():
        weight = model.get_submodule(name).weight.detach().double()
        u, s, _ = torch.linalg.svd(weight)
        p = linalg.energy_rank(s**2, 0.5)
        cosines = torch.linalg.svdvals(u[:, :p].T @ basis.double())
        assert basis.shape[1] == p
        assert float(cosines.min()) > 1 - 1e-5


def test_the_output_side_of_a_layer_that_is_not_square_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"needs square layers, and 'fc1' is \(17, 11\)"):
        learn(MLP(), VectorTask(), weight_side="output")


def released_count(energies, share, *, is_first):
    """Count as the released code does: its loop stops before it adds the direction that reaches the share."""
    covered = torch.tensor(energies).cumsum(0) / sum(energies)
    reaching = int((covered < share).sum()) + 1
    return max(1, reaching - 1) if is_first else reaching


@pytest.mark.parametrize("energy", [1e-6, 0.4, 0.9])
def test_the_releases_energy_rule_is_one_direction_short_for_weights_but_never_without_any(energy):
    method = KeepLoRA(KeepLoRAConfig(**{**OPTIONS, "energy_rule": "one_short", "weight_energy": energy}))
    method.protect(MLP())
    for name, basis in method.bases.items():
        energies = (torch.linalg.svdvals(MLP().get_submodule(name).weight.detach().double()) ** 2).tolist()
        assert basis.shape[1] == released_count(energies, energy, is_first=True)


@pytest.mark.parametrize("weight_energy", [0.0, 0.4])
@pytest.mark.parametrize("feature_energy", [1e-6, 0.6])
def test_the_releases_energy_rule_is_short_once_a_layer(weight_energy, feature_energy):
    """For the first task only if it was not for the weights."""
    options = {"energy_rule": "one_short", "weight_energy": weight_energy, "feature_energy": feature_energy}
    method, model = KeepLoRA(KeepLoRAConfig(**{**OPTIONS, **options})), MLP()
    for seed in (0, 1):
        task = VectorTask(seed=seed)
        adapted = method.before_task(model, task)
        before = method.bases["fc1"]
        model = method.after_task(adapted, task)
        rows = torch.cat([batch[0] for batch in task.data])
        reaching = new_directions({"fc1": before}, {"fc1": rows.T @ rows}, feature_energy)["fc1"].shape[1]
        is_first = seed == 0 and weight_energy == 0
        assert method.record.directions["fc1"].shape[1] == (max(1, reaching - 1) if is_first else reaching)


def test_a_random_a_has_no_gradient_to_start_b_from():
    with pytest.raises(ValueError, match="b_start = 'gradient' needs a_start = 'gradient'"):
        KeepLoRAConfig(a_start="random", b_start="gradient")
