"""Transformers' own model classes, with attention as the plan in config.json says.

Written by `mra-cli patch`, the same text into every checkpoint: what differs between checkpoints
is data, in config.json. `mra_runtime.py` beside it is all this needs; where the package mra_cli
is installed and of the same runtime version, its (faster) implementation is used instead.
"""

from __future__ import annotations

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


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"transformers {transformers.__version__} has no model class {name}")
    patched = globals()[name] = model_class(base, __name__)
    return patched
