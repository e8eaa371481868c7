"""How attention begins: wired for looking up, since a small model takes very long to find out how by itself.

In the first layer, three heads look one, two and three tokens back and write what they see beside each token. In the
two layers after it, a head of the same number looks for the token that has the present one beside it: what comes
behind an earlier "red" is found at once (an induction head). The last head looks for equal tokens. Learning goes on.

Sources: Olsson et al., "In-context learning and induction heads", 2022; Trockman and Kolter, "Mimetic initialization of
self-attention layers", 2023.
"""

import torch
from torch import Tensor
from torch.nn import Linear
from transformers import LlavaForConditionalGeneration

CONSTANT = 3.0  # What every token has in its first dimension, in units of the others' deviation: what positions turn.
BACK, FAST, SHARP = 3, 6, 3.2  # Tokens to look back; pairs of dimensions that turn fast enough for it; how sharply.
BESIDE, FOUND, MATCH = 2.5, 5.0, 2.5  # How loud what stands beside is, what is found, and the question for it.
QUIET, NOISE = 0.1, 1 / 3  # Of a perceptron's outputs; in units of the deviation of weights that are not wired.
LOOKING = (1, 2)  # The layers that look for what stands beside.


@torch.no_grad()
def wire(model: LlavaForConditionalGeneration) -> None:
    """Wire the attention of a new model, in place; multi-layer perceptrons begin quiet."""
    language, generator = model.model.language_model, torch.Generator().manual_seed(1)
    width, deviation = language.config.hidden_size, language.config.initializer_range
    size = width // language.config.num_attention_heads
    language.embed_tokens.weight[:, 0] = CONSTANT * deviation
    model.model.multi_modal_projector.linear_2.bias[0] = CONSTANT * deviation

    def basis() -> Tensor:
        return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    def put(layer: Linear, value: Tensor) -> None:
        layer.weight.copy_(value + NOISE * deviation * torch.randn(value.shape, generator=generator))

    for layer in language.layers:
        layer.mlp.down_proj.weight.mul_(QUIET)
    first = language.layers[0].self_attn
    theta = language.config.rope_parameters["rope_theta"]
    turns = theta ** (-torch.arange(FAST) / (size // 2))
    read, written = basis(), basis()
    read[:, 0] = 0
    first.o_proj.weight[:, BACK * size :] *= QUIET
    for head in range(BACK):
        own = slice(head * size, (head + 1) * size)
        first.q_proj.weight[own], first.k_proj.weight[own] = 0, 0
        # Turned back by the angle of so many tokens, the key of just that token lies on the query.
        pairs = [own.start + pair for pair in range(FAST)]
        first.q_proj.weight[pairs, 0] = SHARP
        first.k_proj.weight[pairs, 0] = SHARP * torch.cos((head + 1) * turns)
        first.k_proj.weight[[pair + size // 2 for pair in pairs], 0] = SHARP * torch.sin((head + 1) * turns)
        first.v_proj.weight[own] = read[own]
        first.o_proj.weight[:, own] = BESIDE * deviation * written[:, own]
    slow = torch.ones(size)
    slow[: size * 3 // 16] = 0  # What turns fast tells positions, not contents.
    slow[size // 2 : size // 2 + size * 3 // 16] = 0
    for number, layer in enumerate(language.layers[1:], 1):
        asked, kept, same = basis(), basis(), basis()
        asked[:, 0] = 0
        kept.copy_(asked)
        if number in LOOKING:
            heads = slice(0, BACK * size)
            asked[heads], kept[heads] = read[heads], written.T[heads]
            kept[heads, 0] = 0
        mask = MATCH * slow.repeat(width // size)[:, None]
        put(layer.self_attn.q_proj, asked * mask)
        put(layer.self_attn.k_proj, kept * mask)
        put(layer.self_attn.v_proj, 0.5 * same)
        put(layer.self_attn.o_proj, FOUND * deviation * same.T)
