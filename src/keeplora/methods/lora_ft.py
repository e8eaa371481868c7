"""LoRA-FT: sequential low-rank fine-tuning without any protection, the paper's plain baseline."""

from keeplora.methods.base import Method


class LoRAFT(Method):
    """Train a fresh LoRA on each task and merge it (Hu et al., 2022); both factors are trained."""
