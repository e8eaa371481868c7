"""The weights of a model: the one place that hashes them."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over the names, types, shapes and bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
