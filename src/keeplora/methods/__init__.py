"""The methods by name. Adding one is a file in this folder and a line here."""

from keeplora.methods.base import Method, MethodConfig, TaskRecord
from keeplora.methods.keeplora import KeepLoRA, KeepLoRAConfig
from keeplora.methods.lora_ft import LoRAFT
from keeplora.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    "keeplora": KeepLoRA,
    "lora_ft": LoRAFT,
    "zero_shot": ZeroShot,
}

__all__ = ["METHODS", "KeepLoRA", "KeepLoRAConfig", "LoRAFT", "Method", "MethodConfig", "TaskRecord", "ZeroShot"]
