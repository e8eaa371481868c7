"""The small CLIP: its configuration, its first weights, and a forward pass that is fast in bfloat16 on CPUs."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from . import tokenise

PATCH, EDGE = 16, 64


def config(vocabulary: int) -> CLIPConfig:
    """Return the configuration: vision 192 x 6, text 128 x 2, patches of 16, context 20."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenise.LENGTH,
        "hidden_act": "gelu",
        "projection_dim": 160,
        "pad_token_id": tokenise.PAD,
        "bos_token_id": tokenise.START,
        "eos_token_id": tokenise.END,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": EDGE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "projection_dim": 160,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=160)


def build(vocabulary: int, sample: Tensor) -> CLIPModel:
    """Return a new model; patch filters whiten the patches of `sample [n, 3, 64, 64]`, positions are sines."""
    settings = config(vocabulary)
    settings._attn_implementation = "eager"
    model = CLIPModel(settings)
    vision = model.vision_model.embeddings
    with torch.no_grad():
        vision.patch_embedding.weight.copy_(whitening_filters(sample, len(vision.patch_embedding.weight)))
        vision.position_embedding.weight[1:] = grid_positions(EDGE // PATCH, settings.vision_config.hidden_size) * 0.3
        model.logit_scale.fill_(2.66)
        open_attention(model)
    return model


def open_attention(model: CLIPModel) -> None:
    """Let the picture reach the class token from the first step, so that features of different images differ."""
    for layer in model.vision_model.encoder.layers:
        for linear, gain in (
            (layer.self_attn.q_proj, 2.0),
            (layer.self_attn.k_proj, 2.0),
            (layer.self_attn.v_proj, 2.5),
            (layer.self_attn.out_proj, 1.2),
            (layer.mlp.fc2, 2.0),
        ):
            linear.weight.mul_(gain)
    model.vision_model.embeddings.class_embedding.mul_(0.1)
    model.vision_model.embeddings.position_embedding.weight[0] = 0


def patches_of(images: Tensor) -> Tensor:
    """Return `[n, patches, 3 * PATCH * PATCH]` in the order of a convolution's weight."""
    n, side = len(images), EDGE // PATCH
    cut = images.reshape(n, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(n, side * side, 3 * PATCH * PATCH)


def whitening_filters(sample: Tensor, count: int) -> Tensor:
    """Return `[count, 3, PATCH, PATCH]` principal directions of patches, scaled to answers of like size."""
    rows = patches_of(sample).reshape(-1, 3 * PATCH * PATCH)
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = vectors[:, -count:].T / (values[-count:, None] + values.mean() * 0.1).sqrt()
    return (kept * 0.3).reshape(count, 3, PATCH, PATCH)


def grid_positions(side: int, width: int) -> Tensor:
    """Return `[side * side, width]` sines and cosines of row and column."""
    frequency = 1 / (20 ** (torch.arange(width // 4) / (width // 4)))
    place = torch.arange(side).float()[:, None] * frequency
    wave = torch.cat([place.sin(), place.cos()], 1)
    return torch.cat([wave.repeat_interleave(side, 0), wave.repeat(side, 1)], 1)


def image_features(model: CLIPModel, images: Tensor) -> Tensor:
    """Return unit features `[n, projection]`; the patch convolution is written as one matrix product."""
    vision = model.vision_model
    weight = vision.embeddings.patch_embedding.weight
    tokens = functional.linear(patches_of(images), weight.flatten(1))
    first = vision.embeddings.class_embedding.to(tokens.dtype).expand(len(images), 1, -1)
    tokens = torch.cat([first, tokens], 1) + vision.embeddings.position_embedding.weight
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
    return functional.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])).float(), dim=-1)


def text_features(model: CLIPModel, ids: Tensor) -> Tensor:
    """Return unit features `[n, projection]` of padded ids, read at <end>."""
    ids = ids[:, : int((ids != tokenise.PAD).sum(1).max())]
    pooled = model.text_model(input_ids=ids).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)
