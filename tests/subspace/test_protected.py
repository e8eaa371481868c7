import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from keeplora.layers.gradients import residuals_of
from keeplora.subspace import protected as subspace
from keeplora.subspace.certificate import (
    LayerCertificate,
    certificate_to_json,
    certificates,
    change_of,
    leak,
)
from tiny import MLP

D_IN = {"fc1": 11, "fc2": 17, "out": 13}


def weights():
    return {name: MLP().get_submodule(name).weight for name in D_IN}


def orthonormal(d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0].float()


def angle(first, second):
    return np.max(subspace_angles(np.asarray(first, np.float64), np.asarray(second, np.float64)))


def share_inside(rows, basis):
    """Return the share of the rows' energy inside a basis, in float64, one row at a time."""
    rows, basis = rows.double(), basis.double()
    return float(sum((basis.T @ row).square().sum() for row in rows) / rows.square().sum())


@pytest.mark.parametrize("share", [0.2, 0.6, 0.85])
def test_principal_bases_hold_the_share_of_each_weight_with_the_fewest_input_directions(share):
    bases = subspace.principal_bases(weights(), dict.fromkeys(D_IN, share))
    for name, weight in weights().items():
        basis = bases[name]
        assert basis.shape[0] == D_IN[name], "the input side"
        assert not basis.requires_grad
        _, _, vh = np.linalg.svd(weight.detach().double().numpy())
        p = basis.shape[1]
        assert angle(basis, vh[:p].T) < 1e-3
        assert share_inside(weight.detach(), basis) >= share - 1e-6
        assert share_inside(weight.detach(), torch.tensor(vh[: p - 1].T)) < share


def test_each_layer_has_its_own_share():
    bases = subspace.principal_bases(weights(), {"fc1": 0.9, "fc2": 0.3, "out": 0.0})
    # The spectrum falls off as 0.8 ** i, so the first p of n directions hold 1 - 0.64 ** p of 1 - 0.64 ** n.
    assert {name: basis.shape[1] for name, basis in bases.items()} == {"fc1": 6, "fc2": 1, "out": 0}


def test_a_basis_of_a_half_precision_weight_is_in_float32():
    half = {name: weight.bfloat16() for name, weight in weights().items()}
    bases = subspace.principal_bases(half, dict.fromkeys(D_IN, 0.5))
    assert all(basis.dtype == torch.float32 for basis in bases.values())


def test_new_directions_reach_the_share_of_the_total_energy_with_the_fewest():
    rows = torch.randn(40, 13) * 0.7 ** torch.arange(13)
    basis, share = orthonormal(13, 3), 0.9
    directions = subspace.new_directions({"out": basis}, {"out": rows.T @ rows}, share)["out"]
    both = torch.cat([basis, directions], dim=1)
    assert share_inside(rows, both) >= share - 1e-6
    residual = rows.double() - rows.double() @ basis.double() @ basis.double().T
    _, _, vh = np.linalg.svd(residual.numpy(), full_matrices=False)
    m = directions.shape[1]
    assert 0 < m < 10
    assert angle(directions, vh[:m].T) < 1e-3
    fewer = torch.cat([basis.double(), torch.tensor(vh[: m - 1].T)], dim=1)
    assert share_inside(rows, fewer) < share
    assert float((basis.T @ directions).abs().max()) < 1e-5
    assert float((directions.T @ directions - torch.eye(m)).abs().max()) < 1e-5


def test_what_is_covered_counts_towards_the_share_of_the_total():
    # Energies .5 .3 .15 .05 along the axes; the first is protected already.
    gram = torch.diag(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    bases = {"layer": torch.eye(4)[:, :1]}
    for share, wanted in ((0.49, []), (0.79, [1]), (0.81, [1, 2]), (0.96, [1, 2, 3])):
        directions = subspace.new_directions(bases, {"layer": gram}, share)["layer"]
        # Of the residual alone, .3 .15 .05, a share of 0.79 would have taken two.
        assert directions.shape == (4, len(wanted))
        torch.testing.assert_close(directions.abs(), torch.eye(4)[:, wanted], atol=1e-6, rtol=0)


def test_bases_that_cover_the_share_get_nothing_new_and_full_ones_neither():
    gram = torch.diag(torch.tensor([1.0, 1e-4, 1e-4]))
    assert subspace.new_directions({"layer": torch.eye(3)[:, :1]}, {"layer": gram}, 0.99)["layer"].shape == (3, 0)
    assert subspace.new_directions({"layer": torch.eye(3)}, {"layer": gram}, 1.0)["layer"].shape == (3, 0)


def test_extend_bases_appends_and_keeps_what_was_there():
    full = orthonormal(9, 6)
    before = {"layer": full[:, :4]}
    after = subspace.extend_bases(before, {"layer": full[:, 4:]})
    assert after["layer"].equal(full)
    assert before["layer"].shape == (9, 4)


def test_residuals_know_which_share_of_the_gradients_norm_is_left():
    gradient, basis = torch.randn(7, 12), orthonormal(12, 5)
    outside = torch.eye(12).double() - basis.double() @ basis.double().T
    wanted = float((gradient.double() @ outside).norm() / gradient.double().norm())
    given = {"any": gradient, "inside": gradient @ basis @ basis.T, "zero": torch.zeros(7, 12)}
    found = residuals_of(dict(given), dict.fromkeys(given, basis))
    assert found.surviving["any"] == pytest.approx(wanted, rel=1e-5)
    assert found.surviving["inside"] < 1e-5
    assert found.surviving["zero"] == 0.0
    assert residuals_of({"any": gradient}, {"any": basis[:, :0]}).surviving["any"] == pytest.approx(1.0)


def test_leak_is_the_share_of_the_update_inside_the_basis():
    a, b, basis = torch.randn(3, 12), torch.randn(7, 3), orthonormal(12, 5)
    update = b.double() @ a.double()
    wanted = float((update @ basis.double()).norm() / update.norm())
    assert leak(a, b, basis) == pytest.approx(wanted, rel=1e-5)
    assert leak(basis.T[:3], b, basis) == pytest.approx(1.0, rel=1e-5)
    assert leak(a, torch.zeros(7, 3), basis) == 0.0


def test_certificate_states_leak_orthonormality_and_what_is_left():
    full = orthonormal(12, 8)
    before = {"layer": full[:, :5], "idle": full[:, :2]}
    skewed = torch.cat([full[:, :5], full[:, 5:8] + 0.01 * full[:, :1]], dim=1)
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    weight = torch.randn(7, 12)
    change = change_of(weight, weight + b @ a, b @ a, before["layer"], 3)
    certificate = certificates({"layer": skewed, "idle": full[:, :2]}, {"layer": change})
    layer, idle = certificate["layer"], certificate["idle"]
    update = b.double() @ a.double()
    protected = full[:, :5].double()
    assert layer.leak == pytest.approx(float((update @ protected).norm() / update.norm()), rel=1e-5)
    off = skewed.double().T @ skewed.double() - torch.eye(8)
    assert layer.orthonormality == pytest.approx(float(off.abs().max()), rel=1e-3)
    assert layer.merge_loss < 1e-6
    assert (layer.protected_dims, layer.residual_dims, layer.rank) == (8, 4, 3)
    assert (idle.leak, idle.protected_dims, idle.residual_dims, idle.rank) == (0.0, 2, 10, 0)


def test_certificate_in_json_names_the_worst_layer_of_each_kind():
    layers = {
        "first": LayerCertificate(1e-7, 2e-3, orthonormality=3e-6, residual_dims=4, protected_dims=8, rank=2),
        "second": LayerCertificate(5e-6, 1e-3, orthonormality=1e-7, residual_dims=9, protected_dims=3, rank=2),
    }
    found = certificate_to_json(layers)
    assert found["worst"] == {"leak": 5e-6, "merge_loss": 2e-3, "orthonormality": 3e-6, "residual_dims": 4}
    assert found["layers"]["second"]["protected_dims"] == 3
    assert certificate_to_json({}) == {}
