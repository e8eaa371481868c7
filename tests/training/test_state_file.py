"""State as bytes: anything comes back exactly, damage is a `ValueError`, and random generators go on as they were."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from keeplora.training.state_file import capture_random, from_bytes, restore_random
from tiny import to_bytes

QUICK = settings(deadline=None, derandomize=True, max_examples=100)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64,
]  # fmt: skip


@st.composite
def tensors(draw):
    """Tensors of any bits, any dtype and any strides: nan and inf are among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty((), dtype=dtype).element_size()
    raw = draw(st.binary(min_size=size * math.prod(shape), max_size=size * math.prod(shape)))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    whole = flat.reshape(shape)
    change = draw(st.sampled_from(["none", "transposed", "expanded", "sliced"]))
    if change == "transposed" and whole.dim() > 1:
        return whole.transpose(0, -1)
    if change == "expanded":
        return whole.unsqueeze(0).expand(2, *whole.shape)
    if change == "sliced" and whole.dim() and len(whole) > 1:
        return whole[1::2]
    return whole


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
KEYS = st.recursive(ATOMS.filter(lambda key: key == key), lambda inner: st.tuples(inner, inner), max_leaves=3)
STATES = st.recursive(
    ATOMS | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(one, other):
    """Tell whether two states are the same to the bit, types and the order of keys included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        bits = [tensor.clone(memory_format=torch.contiguous_format).view(-1) for tensor in (one, other)]
        return torch.equal(*(tensor.view(torch.uint8) for tensor in bits))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return one == other and str(one) == str(other)  # -0.0 is not 0.0.


@settings(QUICK, max_examples=300)
@given(state=STATES)
@example(state={"kind": "tensor", "items": "0"})
@example(state={1: "one", "1": "text", 1.5: None, None: {}, (1, (2,)): ()})
@example(state=[math.inf, -math.inf, math.nan, -0.0, 2**64, -(2**63), True, 1, 1.0])
@example(state=torch.ones(2, 3).t())
@example(state=[torch.tensor(3.0), torch.empty(0, 4), torch.ones(1, dtype=torch.bfloat16)])
@pytest.mark.slow
def test_any_state_comes_back_exactly(state):
    assert same(from_bytes(to_bytes(state)), state)


@QUICK
@given(state=STATES)
def test_equal_states_are_equal_bytes(state):
    assert to_bytes(state) == to_bytes(from_bytes(to_bytes(state)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_comes_back_also_from_odd_places_in_the_file(dtype):
    state = {"odd": torch.ones(3, dtype=torch.uint8), "tensor": torch.arange(4).to(dtype)}
    assert same(from_bytes(to_bytes(state)), state)


@pytest.mark.parametrize(
    "array",
    [np.arange(3, dtype=np.uint32), np.array(2**64 - 1, np.uint64), np.array([True, False]), np.zeros((0, 2), np.int8)],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_whole_numbers_come_back(array):
    assert same(from_bytes(to_bytes([array])), [array])


@pytest.mark.parametrize("array", [np.array([0.5]), np.array([1 + 2j]), np.array(["a"]), np.array([None])], ids=repr)
def test_other_arrays_are_not_rounded_but_refused(array):
    with pytest.raises(AssertionError, match="cannot be kept"):
        to_bytes(array)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, [range(3)]], ids=lambda value: type(value).__name__)
def test_what_json_and_tensors_cannot_hold_is_refused(value):
    with pytest.raises(AssertionError, match="cannot be kept"):
        to_bytes(value)


def test_a_state_is_a_copy():
    tensor = torch.zeros(3)
    content = to_bytes(tensor)
    tensor += 1
    assert from_bytes(content).tolist() == [0, 0, 0]


# Damage


def survives(content):
    """Read bytes that are no state, or another one: a `ValueError` or a state, never another exception."""
    try:
        to_bytes(from_bytes(content))
    except ValueError as error:
        assert str(error).startswith("this is no state of a run: "), error  # noqa: PT017 - both ends are right


def example_state():
    generator = torch.Generator().manual_seed(1)
    draws = {**capture_random([generator]), "python": (3, (1, 2), None), "torch": torch.arange(3, dtype=torch.uint8)}
    draws["generators"] = [torch.arange(2)]
    numbers = {"a": 1.5, (1, "b"): [None, True, math.inf], "c": torch.ones(2, 3, dtype=torch.bfloat16)}
    return {"random": draws | {"numpy": ["MT19937", np.arange(3, dtype=np.uint32), 1, 0, 0.0]}, "tensors": numbers}


@pytest.mark.slow
def test_every_flipped_bit_and_every_truncation_is_an_error_or_a_state():
    content = to_bytes(example_state())
    for place in range(len(content)):
        for bit in range(8):
            survives(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        survives(content[:place])
        survives(content[place:])


@settings(QUICK, max_examples=300)
@given(state=STATES, data=st.data())
@pytest.mark.slow
def test_any_changed_byte_of_any_state_is_an_error_or_a_state(state, data):
    content = to_bytes(state)
    place = data.draw(st.integers(0, len(content) - 1))
    survives(content[:place] + data.draw(st.binary(max_size=2)) + content[place + 1 :])


@QUICK
@given(content=st.binary(max_size=60))
def test_any_other_bytes_are_an_error(content):
    with pytest.raises(ValueError, match="this is no state of a run"):
        from_bytes(content)


KINDS = st.sampled_from(["tensor", "array", "dict", "list", "tuple", "other"])
SKELETONS = st.recursive(
    st.none() | st.integers() | st.sampled_from(["0", "1", "int64", "object"]) | st.lists(st.just("0"), max_size=2),
    lambda inner: st.fixed_dictionaries(
        {}, optional={"kind": KINDS | inner, "items": inner | st.lists(inner | st.lists(inner)), "dtype": inner}
    ),
)


@settings(QUICK, max_examples=300)
@given(skeleton=SKELETONS)
@example(skeleton={"kind": "array", "items": "0", "dtype": "int64"})
@example(skeleton={"kind": "dict", "items": [[{"kind": "list", "items": []}, 1]]})
@example(skeleton={"kind": "array", "items": {"kind": "tensor", "items": "0"}, "dtype": "datetime64"})
@pytest.mark.slow
def test_any_other_skeleton_is_an_error_or_a_state(skeleton):
    content = save({"0": torch.arange(2)}, metadata={"state": json.dumps(skeleton)})
    try:
        from_bytes(content)
    except ValueError as error:
        assert str(error).startswith("this is no state of a run: ")  # noqa: PT017


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": "list", "items": [' * 5000, "9" * 5000, "NaN]", ""])
def test_json_that_no_reader_wants_is_an_error(text):
    with pytest.raises(ValueError, match="this is no state of a run"):
        from_bytes(save({}, metadata={"state": text}))


@pytest.mark.slow
def test_any_nesting_is_filled_or_an_error():
    for depth in range(250, 550):
        text = '{"kind": "list", "items": [' * depth + "]}" * depth
        try:
            from_bytes(save({}, metadata={"state": text}))
        except ValueError as error:
            assert "this is no state of a run" in str(error)  # noqa: PT017


# Random generators


def draws(generators):
    """Draw from everything there is; normal numbers too, of which python and numpy keep one in reserve."""
    return [
        random.random(),
        random.gauss(0, 1),
        random.sample(range(100), 5),
        np.random.rand(3).tolist(),
        np.random.randn(1).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
        torch.randperm(20).tolist(),
        [torch.randn(3, generator=generator).tolist() for generator in generators],
    ]


@QUICK
@given(seed=st.integers(0, 2**32 - 1), before=st.integers(0, 3), between=st.integers(0, 3), count=st.integers(0, 2))
def test_the_draws_behind_a_restored_state_are_those_behind_the_captured_one(seed, before, between, count):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    for _ in range(before):
        draws(generators)
    captured = to_bytes(capture_random(generators))
    expected = draws(generators)
    for _ in range(between):
        draws(generators)
    others = [torch.Generator() for _ in range(count)]
    for kept in (generators, others):
        restore_random(from_bytes(captured), kept)
        assert draws(kept) == expected


def test_without_generators_the_global_ones_are_restored_alone():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    captured = from_bytes(to_bytes(capture_random(generators)))
    everywhere = torch.get_rng_state()
    expected = [torch.randperm(9, generator=generator).tolist() for generator in generators]
    torch.rand(1)
    orders = [generator.get_state() for generator in generators]
    restore_random(captured)
    assert torch.equal(torch.get_rng_state(), everywhere)
    assert all(torch.equal(one.get_state(), order) for one, order in zip(generators, orders, strict=True))
    restore_random(captured, generators)
    assert [torch.randperm(9, generator=generator).tolist() for generator in generators] == expected
    with pytest.raises(ValueError, match="zip"):
        restore_random(captured, generators[:1])
