"""Measure where a pretrained transformer's attention can be approximated."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def load(name: Any, **options: Any) -> Any:
    """The model of a patched checkpoint, see `mra_cli.loading.load`."""
    from mra_cli.loading import load  # here, or `import mra_cli` would import torch

    return load(name, **options)
