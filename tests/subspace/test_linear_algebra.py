import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.utils.extmath import randomized_svd

from keeplora.subspace import linear_algebra as linalg


def orthonormal(d, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0].float()


def matrix_with_spectrum(s, d_out, d_in, seed=0):
    u, v = orthonormal(d_out, len(s), seed).double(), orthonormal(d_in, len(s), seed + 1).double()
    return (u * torch.as_tensor(s, dtype=torch.float64) @ v.T).float()


def same_span(first, second, tolerance=1e-4):
    assert first.shape == second.shape
    return np.max(subspace_angles(np.asarray(first, np.float64), np.asarray(second, np.float64))) < tolerance


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1.0, 4)]
)
def test_energy_rank_is_the_fewest_directions_that_reach_the_share(share, wanted):
    assert linalg.energy_rank(torch.tensor([0.5, 0.3, 0.15, 0.05]), share) == wanted


def test_energy_rank_agrees_with_counting_one_by_one():
    generator = torch.Generator().manual_seed(3)
    for trial in range(50):
        energies = torch.rand(9, generator=generator).sort(descending=True).values
        share, covered = (0.05 + 0.9 * torch.rand(2, generator=generator)).tolist()
        total = covered + float(energies.double().sum()) if trial % 2 else None
        reference = covered + float(energies.double().sum())
        wanted, reached = 0, covered
        while reached < share * reference:
            reached += float(energies[wanted].double())
            wanted += 1
        assert linalg.energy_rank(energies, share, covered=covered, total=total) == wanted


def test_energy_rank_counts_what_is_already_covered():
    energies = torch.tensor([0.3, 0.15, 0.05])
    assert linalg.energy_rank(energies, 0.79, covered=0.5, total=1.0) == 1
    assert linalg.energy_rank(energies, 0.81, covered=0.5, total=1.0) == 2
    assert linalg.energy_rank(energies, 0.49, covered=0.5, total=1.0) == 0


def test_energy_rank_stops_at_all_directions_when_rounding_keeps_the_sum_below():
    assert linalg.energy_rank(torch.tensor([0.5, 0.25]), 0.99, total=1.0) == 2


def test_energy_rank_of_no_energy_is_zero():
    assert linalg.energy_rank(torch.zeros(4), 0.9) == 0
    assert linalg.energy_rank(torch.tensor([-1e-9, -1e-8]), 0.9) == 0


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("share", [0.31, 0.72, 0.93])
def test_top_directions_are_the_leading_right_singular_vectors_of_a_weight(shape, share):
    weight = matrix_with_spectrum(0.75 ** np.arange(7), *shape)
    basis = linalg.top_directions(weight.T @ weight, share)
    _, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    energy = np.cumsum(s**2) / np.sum(s**2)
    p = int(np.argmax(energy >= share)) + 1
    assert basis.shape == (shape[1], p)
    assert same_span(basis, vh[:p].T)
    kept = float((weight.double() @ basis.double()).square().sum() / weight.double().square().sum())
    assert kept == pytest.approx(energy[p - 1], abs=1e-5)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("share", [0.31, 0.72, 0.93, 1.0])
def test_principal_directions_are_those_of_either_sides_gram(shape, share):
    weight = matrix_with_spectrum(0.75 ** np.arange(7), *shape)
    basis = linalg.principal_directions(weight, share)
    _, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    energy = np.cumsum(s**2) / np.sum(s**2)
    p = min(int(np.argmax(energy >= share - 1e-7)) + 1, 7)
    assert basis.shape[0] == shape[1]
    assert same_span(basis[:, :p], vh[:p].T)
    assert linalg.orthonormality_error(basis) < 1e-5
    assert share == 1.0 or basis.shape[1] == p


def test_a_weight_of_zeros_has_no_principal_direction():
    assert linalg.principal_directions(torch.zeros(4, 9), 0.6).shape == (9, 0)
    assert linalg.principal_directions(torch.zeros(9, 4), 0.6).shape == (4, 0)


@pytest.mark.parametrize("k", [0, 2, 3, 11, 18, 19])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_residual_directions_are_the_leading_ones_of_the_projected_rows(k, share):
    """Up to 3 of 19 dimensions take the residual gram, more the coordinates of the complement."""
    rows, basis = torch.randn(40, 19) * 0.8 ** torch.arange(19), orthonormal(19, k)
    found = linalg.residual_directions(rows.T @ rows, basis, share)
    projected = linalg.project_out(rows.double(), basis.double())
    _, s, vh = np.linalg.svd(projected.numpy(), full_matrices=False)
    total = float(rows.double().square().sum())
    covered = total - float((s**2).sum())
    m = 0
    while m < 19 - k and covered + float((s[:m] ** 2).sum()) < share * total:
        m += 1
    assert found.shape == (19, m)
    if m:
        assert same_span(found, vh[:m].T, tolerance=1e-3)
        assert float((found.T @ basis).abs().max() if k else 0) < 1e-5
        assert linalg.orthonormality_error(found) < 1e-5


def test_directions_stay_orthonormal_over_many_tasks():
    d, basis = 96, orthonormal(96, 10)
    for task in range(40):
        rows = torch.randn(300, d, generator=torch.Generator().manual_seed(task)) * 0.9 ** torch.arange(d)
        rows = rows @ orthonormal(d, d, seed=task).T
        basis = torch.cat([basis, linalg.residual_directions(rows.T @ rows, basis, 0.9)], dim=1)
    gram = basis.double().T @ basis.double()
    assert 40 < basis.shape[1] <= d
    assert float((gram - torch.eye(basis.shape[1])).abs().max()) < 5e-6


def test_both_ways_to_the_residual_directions_agree(monkeypatch):
    rows, basis = torch.randn(40, 19) * 0.8 ** torch.arange(19), orthonormal(19, 8)
    ways = []
    for start in (0.0, 1.1):
        monkeypatch.setattr(linalg, "COMPLEMENT_FROM", start)
        ways.append(linalg.residual_directions(rows.T @ rows, basis, 0.9))
    assert not ways[0].equal(ways[1])
    assert same_span(*ways)


def test_top_directions_of_a_share_of_nothing_are_none():
    assert linalg.top_directions(torch.eye(5), 0.0).shape == (5, 0)


def test_project_out_removes_from_every_row_its_part_in_the_span():
    basis, rows = orthonormal(9, 3), torch.randn(5, 9)
    wanted = torch.stack([row - sum((row @ column) * column for column in basis.double().T) for row in rows.double()])
    torch.testing.assert_close(linalg.project_out(rows, basis).double(), wanted, atol=1e-6, rtol=0)
    assert linalg.project_out(rows, basis[:, :0]).equal(rows)


def test_residual_gram_is_the_gram_of_the_projected_rows():
    basis, rows = orthonormal(9, 4), torch.randn(20, 9)
    projected = linalg.project_out(rows.double(), basis.double())
    wanted = sum(torch.outer(row, row) for row in projected)
    torch.testing.assert_close(linalg.residual_gram(rows.T @ rows, basis).double(), wanted, atol=1e-5, rtol=0)


def test_extend_keeps_the_old_columns_bit_by_bit_and_spans_both():
    basis, directions = orthonormal(20, 5, 1), orthonormal(20, 4, 2)
    longer = linalg.extend(basis, directions)
    assert longer[:, :5].equal(basis)
    assert longer.shape == (20, 9)
    assert same_span(longer, torch.cat([basis, directions], dim=1))
    assert linalg.orthonormality_error(longer) < 1e-6


def test_basis_stays_orthonormal_after_many_extensions_by_nearly_covered_directions():
    d = 96
    basis = orthonormal(d, 10)
    for step in range(14):
        inside = basis @ torch.randn(basis.shape[1], 5)
        directions = torch.linalg.qr(inside / inside.norm(dim=0) + 0.02 * orthonormal(d, 5, seed=step + 5))[0]
        longer = linalg.extend(basis, directions)
        assert longer[:, : basis.shape[1]].equal(basis)
        basis = longer
    gram = basis.double().T @ basis.double()
    assert basis.shape[1] == 80
    assert float((gram - torch.eye(80)).abs().max()) < 1e-5


def test_a_direction_already_inside_is_dropped_and_the_others_are_kept_whole():
    basis, new = orthonormal(12, 8).split([6, 2], dim=1)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        directions = torch.cat([basis[:, 2:3], new], dim=1)[:, order]
        longer = linalg.extend(basis, directions)
        assert longer.shape == (12, 8)
        assert same_span(longer, torch.cat([basis, new], dim=1), tolerance=1e-5)


def test_a_row_that_repeats_an_earlier_one_does_not_cost_a_later_one():
    rows = torch.eye(5)[[0, 0, 1]]
    kept = linalg.orthonormal_rows(rows, torch.eye(5)[:, 4:])
    assert kept.shape == (2, 5)
    assert same_span(kept.T, torch.eye(5)[:, :2], tolerance=1e-6)


def test_an_exhausted_space_takes_nothing_more():
    full = orthonormal(6, 6)
    assert linalg.extend(full, orthonormal(6, 2, 7)).equal(full)
    nearly = full[:, :5]
    longer = linalg.extend(nearly, full[:, [1, 5]])
    assert longer.shape == (6, 6)
    assert linalg.orthonormality_error(longer) < 1e-6
    assert len(linalg.orthonormal_rows(orthonormal(6, 3, 8).T, full)) == 0


def test_extending_by_nothing_returns_the_basis():
    basis = orthonormal(6, 2)
    assert linalg.extend(basis, basis[:, :0]).equal(basis)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_low_rank_of_a_small_matrix_is_the_truncated_svd(shape):
    matrix = torch.randn(*shape)
    u, s, vh = linalg.low_rank(matrix, 4)
    wanted_u, wanted_s, wanted_vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert u.shape == (shape[0], 4)
    assert vh.shape == (4, shape[1])
    np.testing.assert_allclose(s, wanted_s[:4], rtol=1e-5)
    best = wanted_u[:, :4] * wanted_s[:4] @ wanted_vh[:4]
    np.testing.assert_allclose((u * s @ vh).double(), best, atol=1e-5)


LARGE = (linalg.EXACT_BELOW + 40, linalg.EXACT_BELOW + 90)


@pytest.mark.parametrize("aligned", [0.0, 0.01, 0.43])
def test_rows_become_orthonormal_however_far_they_are_from_it(aligned):
    """Each row at least 0.9 from the span of those before says nothing of all together."""
    n, basis = 40, orthonormal(60, 5, 3)
    triangle = torch.eye(n)
    for i in range(1, n):
        triangle[i, :i] = -aligned / i**0.5
        triangle[i, i] = (1 - aligned**2) ** 0.5
    rows = triangle @ linalg.orthonormal_rows(torch.randn(n, 60, generator=torch.Generator().manual_seed(0)), basis)
    kept = linalg.orthonormal_rows(rows, basis)
    assert len(kept) == n
    assert linalg.orthonormality_error(torch.cat([basis, kept.T], dim=1)) < 2e-6
    assert linalg.project_out(rows, kept.T).norm() < 1e-4 * rows.norm()


def test_the_lower_half_of_a_gram_is_read():
    gram = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    gram = gram.T @ gram
    disturbed = gram + torch.triu(torch.ones(7, 7), 1)
    assert linalg.top_directions(disturbed, 0.9).equal(linalg.top_directions(gram, 0.9))


def test_low_rank_of_a_large_matrix_spans_the_exact_top_directions():
    matrix = matrix_with_spectrum(0.9 ** np.arange(120), *LARGE)
    u, s, vh = linalg.low_rank(matrix, 8)
    exact_u, exact_s, exact_vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert same_span(vh.T, exact_vh[:8].T, tolerance=1e-4)
    assert same_span(u, exact_u[:, :8], tolerance=1e-4)
    torch.testing.assert_close(s.double(), exact_s[:8], rtol=1e-5, atol=0)


def test_low_rank_of_a_flat_spectrum_is_as_good_as_scikit_learn():
    matrix, r = torch.randn(*LARGE), 8
    _, _, vh = linalg.low_rank(matrix, r)
    _, _, reference = randomized_svd(
        matrix.numpy(), r, n_oversamples=(linalg.OVERSAMPLING - 1) * r, n_iter=linalg.POWER_ITERATIONS, random_state=0
    )
    ours, theirs = (
        float((matrix.double() @ torch.tensor(v).double().T).square().sum()) for v in (vh.numpy(), reference)
    )
    assert ours > 0.98 * theirs


def test_low_rank_is_seeded_and_leaves_the_global_generator_alone():
    matrix = torch.randn(*LARGE)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = linalg.low_rank(matrix, 3, seed=5)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    for ours, again in zip(first, linalg.low_rank(matrix, 3, seed=5), strict=True):
        assert ours.equal(again)
    assert not first[2].equal(linalg.low_rank(matrix, 3, seed=6)[2]), "the seed reaches the sketch"


@pytest.mark.parametrize("r", [0, -1, 8])
def test_low_rank_refuses_a_rank_that_the_matrix_cannot_have(r):
    with pytest.raises(ValueError, match=f"rank {r} is not between 1 and 7"):
        linalg.low_rank(torch.randn(7, 9), r)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    matrix = torch.eye(5, dtype=dtype)
    for function in (lambda: linalg.low_rank(matrix, 2), lambda: linalg.top_directions(matrix, 0.5),
                     lambda: linalg.orthonormal_rows(matrix, matrix[:, :1])):  # fmt: skip
        with pytest.raises(AssertionError, match="too coarse"):
            function()


def test_orthonormality_error_is_the_largest_entry_off_the_identity():
    basis = torch.eye(4)[:, :2].clone()
    basis[0, 1] = 0.25
    assert linalg.orthonormality_error(basis) == pytest.approx(0.25)
    assert linalg.orthonormality_error(torch.empty(4, 0)) == 0.0


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(7, 19, 13), (16, 9, 12), (5, 4, 21)])
@pytest.mark.parametrize("r", [1, 3, 40])
def test_truncated_factors_are_the_svd_of_the_full_product(n, d_in, d_out, r):
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    b = torch.randn(d_out, n, generator=generator, dtype=torch.float64)
    small_a, small_b, s = linalg.truncated(a, b, r)
    u, values, vh = torch.linalg.svd(b @ a, full_matrices=False)
    best = u[:, :r] * values[:r] @ vh[:r]
    torch.testing.assert_close(small_b @ small_a, best)
    assert small_a.shape == (len(small_a), d_in)
    assert len(small_a) == small_b.shape[1] == min(r, n, d_in, d_out)
    torch.testing.assert_close(s, values[: len(s)])
    torch.testing.assert_close(s[r:].norm(), (b @ a - best).norm())
    torch.testing.assert_close((small_a @ small_a.T).diagonal(), (small_b.T @ small_b).diagonal())


def test_truncating_nothing_gives_nothing():
    a, b, s = linalg.truncated(torch.randn(3, 5), torch.zeros(4, 3), 2)
    assert (b @ a).abs().max() == 0
    assert s.max() == 0
