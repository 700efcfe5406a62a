"""Shared fixtures: the demo checkpoints, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

from mra_cli.checkpoint import DEMOS, Checkpoint, load_checkpoint, locate

torch.set_num_threads(1)  # workers run side by side


def _demo(name: str) -> Checkpoint:
    path = locate(f"demo:{name}")
    if path is None:
        message = f"{DEMOS[name].distribution} is not installed; `make demo` installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return load_checkpoint(f"demo:{name}")


@pytest.fixture(scope="session")
def minilm() -> Checkpoint:
    """all-MiniLM-L6-v2, a BERT encoder: 6 layers, 12 heads, 512 positions."""
    return _demo("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, a causal model: 30 layers, 9 query and 3 key heads."""
    return _demo("smollm2")
