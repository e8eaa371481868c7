"""Offline, seeded, one thread; set before anything imports torch or a Hugging Face library."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # rich keeps the width that it finds here when a module is imported

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def disk_that_does_not_wait():
    """Let nothing wait for the disk itself: it takes half of the time of a short run, and no test cuts the power.

    tests/runs/test_atomic_store.py sees that the library asks for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
