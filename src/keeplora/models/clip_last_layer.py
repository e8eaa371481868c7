"""The last layer of a CLIP vision tower, computed for the one row that its features are read from.

The tower's answer is the first row of the last layer's output. Only that layer's keys and values need the other rows:
about five sixths of its work, in both directions, are left out. Features and gradients are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoder, CLIPEncoderLayer

from keeplora.layers import lora
from keeplora.layers.module_state import is_compiled, is_watched


@contextmanager
def only_the_pooled_row(model: nn.Module) -> Iterator[None]:
    """Let the vision tower's last layer compute only the first row, and so return it alone: `[n, 1, d]`.

    For what reads the tower's pooled features and nothing else. A tower that is watched by hooks (statistics expect all
    rows), recomputed in the backward pass, compiled, or of other parts than CLIP's and LoRA's computes all rows.
    """
    lent = {layer: partial(_forward, layer) for layer in _last_layers(model) if "forward" not in vars(layer)}
    for layer, forward in lent.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in lent.items():
            if vars(layer).get("forward") is forward:
                del layer.forward


def _last_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the last vision layer of every CLIP inside a model that is as transformers made it."""
    if any(map(is_compiled, model.modules())):
        return
    for clip in (module for module in model.modules() if type(module) is CLIPModel):
        tower: Any = clip.vision_model
        encoder: Any = getattr(tower, "encoder", None)
        is_stock = type(tower) is CLIPVisionModel and type(encoder) is CLIPEncoder
        if is_stock and not any(map(is_watched, (clip, tower, encoder))) and _is_plain(encoder.layers[-1]):
            yield encoder.layers[-1]


def _is_plain(layer: Any) -> bool:
    """Say whether a layer is CLIP's own, and nobody looks at what happens inside."""
    if type(layer) is not CLIPEncoderLayer or (type(layer.self_attn), type(layer.mlp)) != (CLIPAttention, CLIPMLP):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2)
    return (
        all(map(_treats_rows_alike, linears))
        and all(type(norm) is nn.LayerNorm for norm in (layer.layer_norm1, layer.layer_norm2))
        and attention.config._attn_implementation == "sdpa"
        and not any(map(is_watched, layer.modules()))
        and not layer.gradient_checkpointing
        and not (layer.training and attention.dropout)
    )


def _treats_rows_alike(linear: nn.Module) -> bool:
    """Say whether a layer is linear, or such a one with LoRA that looks at no row's place and draws no numbers."""
    if isinstance(linear, lora.LoraLinear):
        return not linear.lora_variant and all(type(one) is nn.Identity for one in linear.lora_dropout.values())
    return type(linear) is nn.Linear


def _forward(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Do what `CLIPEncoderLayer` does, for the first row `[n, 1, d]`."""
    if attention_mask is not None or not _is_plain(layer):  # Hooks may have come since the layer was lent.
        return cast(Tensor, type(layer).forward(layer, hidden_states, attention_mask, **kwargs))
    attention = layer.self_attn
    rows = layer.layer_norm1(hidden_states)
    # As a matrix `[n, d]`: torch sums products of one row of many in another order when no weight needs a gradient.
    inputs = (attention.q_proj(rows[:, 0]).unsqueeze(1), attention.k_proj(rows), attention.v_proj(rows))
    queries, keys, values = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in inputs)
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
    first = hidden_states[:, 0] + attention.out_proj(mixed.flatten(1))
    return cast(Tensor, first + layer.mlp(layer.layer_norm2(first))).unsqueeze(1)
