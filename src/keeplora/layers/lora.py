"""LoRA adapters of stock PEFT: attach with given factors, read, save, reload, merge. The only importer of peft.

Layer names are those of the base model, without PEFT's prefix.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from pydantic import BaseModel, FiniteFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keeplora.config import read_json, require
from keeplora.layers.names import ATTENTION, AUTO, DECODER, tower_of

ADAPTER = "default"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
N = TypeVar("N", int, float)
LoraLinear: TypeAlias = Linear  # A linear layer that PEFT adapted.


A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"


class _Adapter(BaseModel, extra="allow", strict=True):
    """The settings of an adapter that differ from PEFT's own."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: FiniteFloat
    rank_pattern: dict[str, PositiveInt]
    alpha_pattern: dict[str, FiniteFloat]
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None
    base_model_name_or_path: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter, detached from its model: what an `adapter/` folder holds."""

    config: PeftConfig
    weights: dict[str, Tensor]

    def files(self) -> dict[str, bytes]:
        """Return the files of a stock PEFT adapter folder, by name; equal adapters give equal bytes."""
        config = self.config.to_dict() | {"inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        text = json.dumps(dict(sorted(plain.items())), indent=2)  # The order inside a pattern matters to PEFT.
        return {CONFIG_FILE: text.encode(), WEIGHTS_FILE: save(self.weights, metadata={"format": "pt"})}

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors `(a, scaling * b)` of every layer, in float32; their product is the update."""
        config = cast(LoraConfig, self.config)
        factors = {}
        for key, a in self.weights.items():
            if key.endswith(A_KEY):
                name = key.removeprefix(PREFIX).removesuffix(A_KEY)
                alpha = config.alpha_pattern.get(name, config.lora_alpha)
                b = self.weights[key.removesuffix(A_KEY) + B_KEY]
                factors[name] = (a.float(), b.float() * (alpha / a.shape[0]))
        return factors

    def based_on(self, model: nn.Module, source: str) -> "SavedAdapter":
        """Return the same adapter with its base model named in it: the class, and the hub name or folder."""
        config = copy.copy(self.config)
        config.base_model_name_or_path = source
        config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        return SavedAdapter(config, self.weights)

    def cast(self, dtype: torch.dtype) -> "SavedAdapter":
        """Return the same adapter with its factors in another precision."""
        return SavedAdapter(self.config, {name: value.to(dtype) for name, value in self.weights.items()})

    @staticmethod
    def config_from(content: bytes, path: Path = Path(CONFIG_FILE)) -> PeftConfig:
        """Read the configuration of a saved adapter from a file's content; refuse what `files` cannot have written."""
        values, plain = read_json(content, path), LoraConfig().to_dict()
        require(_Adapter, values, str(path))
        for key, value in values.items():
            if key not in _Adapter.model_fields and (key not in plain or type(value) is not type(plain[key])):
                raise ValueError(f"{path} is damaged or not of keeplora: {key} = {value!r}")
        return PeftConfig.from_peft_type(**values)


def require_unadapted(model: nn.Module) -> None:
    """Check that no layer has an adapter: a second one would be trained beside it."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"the model has {len(adapted)} layers with an adapter, {adapted[0]!r} first. If a task was interrupted,"
            " take it back: model = method.abandon(adapted). If the adapter is your own, merge it first: model ="
            " adapted.merge_and_unload()"
        )


def linear_targets(model: nn.Module, names: tuple[str, ...], towers: tuple[str, ...] = (AUTO,)) -> list[str]:
    """List the `nn.Linear` modules whose name is, or ends in, one of the names, in the model's order.

    `auto` among the names stands for the linear layers of a language model's blocks, and for the attention projections
    of a model without one. Of a vision-language model only the layers in the language model are listed, unless `towers`
    names others (of vision, text, language, projector). Linear layers inside `nn.MultiheadAttention` are left out: it
    reads their weights past the layer itself, so that an adapter on them would change nothing. If there is none, the
    error lists the names there are.
    """
    hidden = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
    }
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in hidden]
    decoder = [name for name in linears if re.search(DECODER, name)]
    if AUTO not in towers:
        inside = [name for name in linears if tower_of(name) in towers]
    else:  # With a vision tower beside it, a suffix alone would reach into that.
        has_vision = decoder and any(tower_of(name) == "vision" for name in linears)
        inside = [name for name in linears if tower_of(name) == "language"] if has_vision else linears
    suffixes = tuple(name for name in names if name != AUTO)
    if AUTO in names and decoder:
        automatic = {name for name in inside if tower_of(name)}
    else:
        automatic = set()
        suffixes += ATTENTION if AUTO in names else ()
    found = [
        name
        for name in inside
        if name in automatic or any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
    ]
    if not found:
        endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in inside or linears})) or "none"
        asked, where = " or ".join(names), "" if AUTO in towers else f" in {' or '.join(towers)}"
        others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, Conv1D)})
        hint = f"; its {others[0]} layers are no nn.Linear and take no update" if others else ""
        raise ValueError(f"no linear layer is named {asked}{where}; set targets to some of: {endings}{hint}")
    return found


def attach(
    model: nn.Module,
    ranks: dict[str, int],
    alphas: dict[str, float],
    *,
    factors: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> nn.Module:
    """Wrap a model in a stock PEFT LoRA with a rank and an alpha for each layer; the update is `alpha / rank * b @ a`.

    The model's own parameters are frozen. `factors` are start values `(a [r, d_in], b [d_out, r])`; `a` is then frozen
    too. Without them the start is PEFT's own.
    """
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        exclude_modules=_namesakes(model, set(ranks)) or None,
        lora_dropout=0.0,
        bias="none",
    )
    adapted: nn.Module = get_peft_model(model, config)
    layers = lora_layers(adapted)
    assert set(layers) == set(ranks), "PEFT adapted other layers than it was told"
    for name, layer in layers.items():
        assert layer.scaling[ADAPTER] == alphas[name] / ranks[name], f"PEFT scales {name} in its own way"
    for name, (a, b) in (factors or {}).items():
        set_factors(layers[name], a, b)
        layers[name].lora_A[ADAPTER].weight.requires_grad_(False)
    return adapted


def _pattern(values: dict[str, N], default: N) -> dict[str, N]:
    """List the layers whose value PEFT, which takes the first entry that ends a layer's name, would not take so.

    Longer names come first, and a layer with the default is listed too where a shorter name would claim it.
    """
    different = {name for name in values if values[name] != default}
    claimed = {name for name in values if any(name.endswith(f".{other}") for other in different)}
    return {name: values[name] for name in sorted(different | claimed, key=lambda name: (-len(name), name))}


def _namesakes(model: nn.Module, targets: set[str]) -> list[str]:
    """List the layers that PEFT would take for a target because their name ends in one."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in targets]
    return [name for name in names if any(name.endswith(f".{target}") for target in targets)]


def lora_layers(adapted: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by their name in the base model."""
    # Of a weight of 4 bits, PEFT's layer is another class with the same parts.
    found = {name: cast(Linear, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    return {name.removeprefix(PREFIX): module for name, module in found.items()}


def set_factors(layer: LoraLinear, a: Tensor, b: Tensor) -> None:
    """Copy the factors `a [r, d_in]` and `b [d_out, r]` into an adapted layer."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(a)
        layer.lora_B[ADAPTER].weight.copy_(b)


def thaw_a(adapted: nn.Module) -> None:
    """Let the optimiser train the factor `a` of every adapted layer."""
    for layer in lora_layers(adapted).values():
        layer.lora_A[ADAPTER].weight.requires_grad_(True)


def factors_of(adapted: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the factors `(a, scaling * b)` of every adapted layer, in float32; their product is the update."""
    return {
        name: (
            layer.lora_A[ADAPTER].weight.detach().float(),
            layer.lora_B[ADAPTER].weight.detach().float() * layer.scaling[ADAPTER],
        )
        for name, layer in lora_layers(adapted).items()
    }


def trained_update(layer: LoraLinear) -> Tensor:
    """Return the update `scaling * b @ a` `[d_out, d_in]` of an adapted layer, through which gradients flow.

    It is in float32 inside a region of mixed precision too: the square of a small update vanishes in half precision.
    """
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    with torch.autocast(a.device.type, enabled=False):
        return cast(Tensor, (layer.scaling[ADAPTER] * b.float()) @ a.float())


def detach(adapted: nn.Module) -> SavedAdapter:
    """Copy the adapter out of a model, so that it can be saved after the merge."""
    weights = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    copies = {name: value.detach().cpu().clone() for name, value in weights.items()}
    config = copy.copy(cast(PeftModel, adapted).peft_config[ADAPTER])
    config.base_model_name_or_path = None  # It may be a folder of this machine.
    return SavedAdapter(config, copies)


def inner(adapted: nn.Module) -> nn.Module:
    """Return the base model with the adapter's layers inside it, without PEFT's wrapper."""
    return cast(nn.Module, cast(PeftModel, adapted).get_base_model())


def base_name(name: str) -> str:
    """Return the name that a parameter of the model inside an adapter has without the adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def unload(adapted: nn.Module) -> nn.Module:
    """Take the adapter out without merging it, if there is one, and return the plain base model."""
    return cast(nn.Module, adapted.unload()) if isinstance(adapted, PeftModel) else adapted


def reload(model: nn.Module, folder: Path) -> nn.Module:
    """Reload a saved adapter into its base model; PEFT would take a pickled one, we do not."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}; adapters are read from safetensors alone")
    SavedAdapter.config_from((folder / CONFIG_FILE).read_bytes(), folder / CONFIG_FILE)
    try:
        stored = load((folder / WEIGHTS_FILE).read_bytes())
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=ADAPTER)
    except (RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder} does not fit the model, or is damaged: {error}") from error
    loaded = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    if odd := sorted(stored.keys() ^ loaded.keys()):
        raise ValueError(f"the adapter {folder} is damaged: {odd[0]!r} is missing, or one too many")
    return cast(nn.Module, adapted)
