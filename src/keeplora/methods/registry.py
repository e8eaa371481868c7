"""The methods by name. Adding one is a file in this folder and a line here; a variant is a table in `variants.toml`."""

from functools import cache
from pathlib import Path
from typing import Any

from keeplora.config import read_toml
from keeplora.methods.base import Method
from keeplora.methods.baselines import Joint, LoRAFT, ZeroShot
from keeplora.methods.cl_moe import CLMoE
from keeplora.methods.ewc import EWC
from keeplora.methods.inflora import InfLoRA
from keeplora.methods.keeplora import KeepLoRA
from keeplora.methods.olora import OLoRA
from keeplora.methods.sd_lora import SDLoRA
from keeplora.methods.sefe import SEFE
from keeplora.registry import Registry

METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "zero_shot": ZeroShot,
        "lora_ft": LoRAFT,
        "ewc": EWC,
        "olora": OLoRA,
        "inflora": InfLoRA,
        "sd_lora": SDLoRA,
        "sefe": SEFE,
        "cl_moe": CLMoE,
        "keeplora": KeepLoRA,
        "joint": Joint,
    },
)

VARIANTS = Path(__file__).with_name("variants.toml")  # Methods that are another one with other options, as data.


@cache
def variants() -> dict[str, dict[str, Any]]:
    """Return the variants by name: the `method` each is one of, its `options`, and a `description`."""
    return read_toml(VARIANTS)


def known_methods() -> list[str]:
    """List the names of all methods and variants."""
    return [*METHODS.names(), *variants()]


def method_behind(name: str) -> str:
    """Return the name of the method that a variant is one of; a method's own name is itself."""
    return str(variants()[name]["method"]) if name in variants() else name


def settings_of(name: str) -> str:
    """Return whose settings a method is run with: its own, or, for an ablation, those of the method it takes apart."""
    return method_behind(name) if variants().get(name, {}).get("inherits_settings") else name


def find_method(name: str) -> tuple[type[Method], dict[str, Any]]:
    """Return the class of a method or variant, and the options that make the variant, or list the known names."""
    if name in variants():
        return METHODS[method_behind(name)], dict(variants()[name]["options"])
    if name not in known_methods():
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(known_methods())}")
    return METHODS[name], {}
