"""Updates beside the weights of a layer."""

import pytest
import torch
from torch import nn

from keeplora.layers.beside import add_beside, beside, remove_beside


def layer(d_in=7, d_out=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, d_out))


def factors(r, d_in=7, d_out=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)


def test_a_layer_computes_with_all_updates_and_without_those_taken_out():
    model, x = layer(), torch.randn(3, 7)
    base, weight = model(x), model[0].weight.detach().clone()
    first, second = factors(2), factors(3, seed=2)
    for a, b in (first, second):
        add_beside(model, "0", a, b)
    expected = base + x @ (first[1] @ first[0] + second[1] @ second[0]).T
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.equal(model[0].weight, weight)
    assert [len(a) for a, _ in beside(model)["0"]] == [2, 3]
    with pytest.raises(ValueError, match="the update is not beside the weight of layer '0'"):
        remove_beside(model, "0", *factors(2, seed=3))
    remove_beside(model, "0", *first)
    assert torch.allclose(model(x), base + x @ (second[1] @ second[0]).T, atol=1e-5)
    remove_beside(model, "0", *second)
    assert torch.equal(model(x), base)
    assert not model[0]._forward_hooks
