"""The last layer of a CLIP vision tower, computed for the one row that its features are read from.

The tower's answer is the first row of the last layer's output. That layer's keys and values need all rows; its queries,
output projection and feed-forward part need the first alone. What is left out are eight ninths of the layer's work, in
both directions. Features, gradients and everything before the layer are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPVisionModel

from keeplora import adapter


@contextmanager
def only_the_pooled_row(model: nn.Module) -> Iterator[None]:
    """Let the vision tower's last layer compute only the first row, and so return it alone: `[n, 1, d]`.

    A layer that is watched by hooks, recomputed in the backward pass, or of other parts than CLIP's and LoRA's,
    computes all rows as ever: the inputs of its projections are then what a statistic expects.
    """
    lent = [layer for layer in _last_layers(model) if _is_plain(layer)]
    for layer in lent:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in lent:
            del layer.forward


def _last_layers(model: nn.Module) -> list[nn.Module]:
    towers = [module for module in model.modules() if type(module) is CLIPVisionModel]
    return [cast(Any, tower).encoder.layers[-1] for tower in towers]


def _is_plain(layer: nn.Module) -> bool:
    """Say whether a layer is CLIP's own, and nobody looks at what happens inside."""
    attention: Any = getattr(layer, "self_attn", None)
    if type(layer) is not CLIPEncoderLayer or type(attention) is not CLIPAttention:
        return False
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return (
        all(type(projection) in (nn.Linear, adapter.LoraLinear) for projection in projections)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
        and not any("forward" in vars(module) for module in (layer, attention))
        and not layer.gradient_checkpointing
        and not (layer.training and attention.dropout)
    )


def _forward(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Do what `CLIPEncoderLayer` does, for the first row `[n, 1, d]`."""
    if attention_mask is not None:
        return cast(Tensor, type(layer).forward(layer, hidden_states, attention_mask, **kwargs))
    attention = layer.self_attn
    rows = layer.layer_norm1(hidden_states)
    # As a matrix `[n, d]`: torch sums products of one row of many in another order when no weight needs a gradient.
    inputs = (attention.q_proj(rows[:, 0]).unsqueeze(1), attention.k_proj(rows), attention.v_proj(rows))
    queries, keys, values = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in inputs)
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
    first = hidden_states[:, 0] + attention.out_proj(mixed.flatten(1))
    return cast(Tensor, first + layer.mlp(layer.layer_norm2(first))).unsqueeze(1)
