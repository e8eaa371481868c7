"""What a layer's name tells: the tower it belongs to, and how deep it lies there."""

import re
from collections import defaultdict
from collections.abc import Mapping

AUTO = "auto"  # In place of names of layers or towers: those that suit the model.

DECODER = (
    r"(^|\.)(language_model|text_model|model)\.(model\.)?layers\.\d+"
    r"\.(self_attn\.([qkvo]_proj|qkv_proj)|mlp\.(gate_proj|up_proj|down_proj|gate_up_proj))$"
)
"""The linear layers of the blocks of a language model, alone or inside a vision-language model."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
"""The attention projections of both towers of a dual encoder."""

PROJECTORS = ("multi_modal_projector", "merger", "deepstack_merger_list", "connector", "mm_projector")
VISION = ("vision", "visual", "image_tower", "video_tower")
TOWERS = ("vision", "text", "language", "projector")


def tower_of(name: str) -> str:
    """Return which of `TOWERS` a layer's name names, or ""; `text` is the tower of a dual encoder."""
    parts = name.split(".")
    if any(part in PROJECTORS for part in parts):
        return "projector"
    if any(part == tower or part.startswith(f"{tower}_") for part in parts for tower in VISION):
        return "vision"
    if re.search(DECODER, name):
        return "language"
    return "text" if in_tower(name, "text") else ""


def in_tower(name: str, tower: str) -> bool:
    """Tell whether part of a layer's name is the tower's, alone or followed by an underscore: vision, vision_model."""
    return any(part == tower or part.startswith(f"{tower}_") for part in name.split("."))


def tower_share(name: str, weight_energy: float | Mapping[str, float]) -> float:
    """Return a layer's share of the energy: the one value, or that of the tower which its name names, or `other`'s."""
    if not isinstance(weight_energy, Mapping):
        return weight_energy
    known = [] if (own := tower_of(name)) == "language" else weight_energy
    tower = own if own in weight_energy else next((tower for tower in known if in_tower(name, tower)), "other")
    if tower in weight_energy:
        return weight_energy[tower]
    towers = ", ".join(weight_energy)
    raise ValueError(
        f"layer {name!r} is in none of the towers {towers} of weight_energy; add a value for other"
        ", or give one value for all"
    )


def layer_scales(names: list[str], first: float) -> dict[str, float]:
    """Return the factor of each layer's update: `first` at the shallowest block of its tower, 1 at the deepest.

    The first number in a name is that of the block; layers without one keep the factor 1 (KeepLoRA++, 2606.16256).
    """
    blocks: dict[str, dict[str, int]] = defaultdict(dict)
    for name in names:
        if match := re.match(r"(|.*?\.)(\d+)(\.|$)", name):
            blocks[match[1]][name] = int(match[2])
    scales = dict.fromkeys(names, 1.0)
    for tower in blocks.values():
        numbers = sorted(set(tower.values()))
        for name, number in tower.items():
            depth = numbers.index(number) / (len(numbers) - 1) if len(numbers) > 1 else 1.0
            scales[name] = first + (1.0 - first) * depth
    return scales
