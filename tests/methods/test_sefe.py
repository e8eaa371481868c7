import pytest
import torch

from keeplora.methods.sefe import SEFE, SEFEConfig, key_elements
from penalties import MLP, NAMES, learn, penalised, require_an_equal_resumed_run, started, updates


def sefe(**options):
    return SEFE(SEFEConfig(**{"targets": NAMES, "rank": 3, "alpha": 2.0, "strength": 2.0, **options}))


def mean_magnitude(update, earlier, share):
    """Average `|dW|` over the key elements of each earlier update, found by sorting all; twice held counts twice."""
    values = []
    for old in earlier:
        places = [(i, j) for i in range(old.shape[0]) for j in range(old.shape[1])]
        places.sort(key=lambda place: -abs(float(old[place])))
        values += [abs(float(update[place])) for place in places[: int(share * old.numel() + 1e-9)]]
    return sum(values) / len(values)


def test_there_is_no_penalty_on_the_first_task():
    method = sefe()
    assert method.penalty(started(method, MLP())) is None


@pytest.mark.parametrize(
    ("share", "shape", "count"),
    [(0.02, (50, 7), 7), (0.02, (17, 11), 3), (0.02, (6, 5), 1), (0.29, (25, 4), 29), (1.0, (4, 3), 12)],
)
def test_key_elements_are_the_largest_in_magnitude_rounded_down_but_at_least_one(share, shape, count):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    places = key_elements(update, share)
    assert len(places) == len(set(places.tolist())) == count
    chosen = torch.zeros(update.numel(), dtype=torch.bool)
    chosen[places] = True
    magnitudes = update.abs().flatten()
    assert count == update.numel() or magnitudes[chosen].min() > magnitudes[~chosen].max()


def test_a_large_negative_element_is_a_key_element():
    update = torch.zeros(5, 7)
    update[3, 2], update[1, 1] = -4.0, 3.0
    assert key_elements(update, 0.03).tolist() == [3 * 7 + 2]


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_penalty_is_the_mean_magnitude_at_the_key_elements_of_the_earlier_tasks(share):
    method = sefe(key_share=share)
    records, model = learn(method, MLP(), seeds=(0, 1))
    adapted = penalised(started(method, model))
    means = []
    for name, update in updates(adapted).items():
        earlier = [b @ a for a, b in (record.adapter.factors()[name] for record in records)]
        means.append(mean_magnitude(update, earlier, share))
    assert float(method.penalty(adapted).detach()) == pytest.approx(2.0 * sum(means) / len(means), rel=1e-5)


def test_places_of_two_tasks_are_kept_once_with_their_count():
    method = sefe(key_share=0.3)
    records, _ = learn(method, MLP(), seeds=(0, 1))
    for name, (places, counts) in method.keys.items():
        first, second = (
            set(key_elements(b @ a, 0.3).tolist()) for a, b in (record.adapter.factors()[name] for record in records)
        )
        assert first & second, "some element is held twice"
        assert places.tolist() == sorted(first | second)
        assert counts.tolist() == [(place in first) + (place in second) for place in places.tolist()]


def test_other_elements_are_free():
    method = sefe(key_share=0.3)
    _, model = learn(method, MLP(), seeds=(0,))
    adapted = penalised(started(method, model))
    layer = method.layers["fc1"]
    places, _ = method.keys["fc1"]
    rows = torch.unique(places // 11)
    method.penalty(adapted).backward()
    gradient = layer.lora_B["default"].weight.grad
    free = torch.ones(17, dtype=torch.bool)
    free[rows] = False
    assert gradient[~free].abs().sum(1).min() > 0
    assert gradient[free].abs().sum() == 0


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    one, other = require_an_equal_resumed_run(sefe, tmp_path)
    assert set(one.keys) == set(NAMES)
    for name, values in one.keys.items():
        assert all(value.equal(again) for value, again in zip(values, other.keys[name], strict=True))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, 2.0, float("nan")])
def test_a_bad_share_is_an_error(share):
    with pytest.raises(ValueError, match=r"key_share = .*: Input should be"):
        SEFEConfig(key_share=share)


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_a_bad_strength_is_an_error(strength):
    with pytest.raises(ValueError, match=r"strength = .*: Input should be"):
        SEFEConfig(strength=strength)
