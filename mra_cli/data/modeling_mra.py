"""Transformers' own model classes, with attention as the plan in config.json says.

Written by `mra-cli patch`, the same text into every checkpoint: what differs between checkpoints
is data, in config.json. `mra_runtime.py` beside it is all this needs; where the package mra_cli
is installed and of the same runtime version, its (faster) implementation is used instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from .mra_runtime import RUNTIME, model_class

try:
    from mra_cli import remote
except ImportError:
    pass
else:
    if remote.RUNTIME == RUNTIME:
        model_class = remote.model_class


def code_files() -> dict[str, str]:
    """This file and the runtime: what a saved model needs beside its weights."""
    names = ("modeling_mra.py", "mra_runtime.py")
    return {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names}


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"transformers {transformers.__version__} has no model class {name}")
    patched = globals()[name] = model_class(base, __name__, code_files)
    return patched
