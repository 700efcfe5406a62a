"""Model classes that read a plan in their config and run it: what makes a patched checkpoint load.

With its imports this is the runtime that `export` puts into every patched checkpoint.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mra_cli.errors import InputError
from mra_cli.host import chosen_implementations, derived, forget_implementation, register
from mra_cli.patching import answer, handled_by, install
from mra_cli.plan import Plan

RUNTIME = 1
"""Raised when patched checkpoints written before would be read otherwise. A checkpoint brings its
own runtime, and prefers an installed mra_cli of the same number."""

CONFIG_KEY = "mra"
"""Where in config.json a plan lies: ``{"implementation": ..., "strict": ..., "plan": ...}``."""


STRICT = "_needs_trust_remote_code"
"""Appended to the implementation that the config.json of a strict checkpoint asks for. That name is
never registered: loading fails, saying it, unless the plan's code runs and sees to it."""


def model_class(
    base: type[PreTrainedModel], module: str, code_files: Callable[[], dict[str, str]]
) -> type[PreTrainedModel]:
    """``base`` with the plan of its config at work from the start.

    A caller who passes ``attn_implementation`` gets what was asked for instead.

    Args:
        base: A class of transformers.
        module: Name of the module the class is to belong to.
        code_files: Name and text of the Python files a saved model needs; not every transformers
            saves them, and none does for a class that it did not load from a checkpoint itself.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        entry = getattr(config, CONFIG_KEY, None)
        if entry is None:
            base.__init__(self, config, *args, **kwargs)
            return
        name, plan = read_entry(entry)
        forget_implementation(config, name + STRICT)
        chosen = chosen_implementations(config, name)
        register(name, handled_by(answer))
        base.__init__(self, config, *args, **kwargs)
        if chosen is None:
            return
        missing = install(self, plan, name)
        if chosen:
            self.set_attn_implementation(chosen)
        if missing:
            warnings.warn(
                f"{base.__name__} has {len(plan.sites) - len(missing)} of the {len(plan.sites)} "
                f"attention sites of its plan, {missing[0]} not for one",
                stacklevel=3,
            )

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base.save_pretrained(self, save_directory, *args, **kwargs)
        entry = getattr(self.config, CONFIG_KEY, None)
        path = Path(save_directory) / "config.json"
        if not entry or not path.is_file():
            return
        for name, text in code_files().items():
            path.with_name(name).write_text(text, encoding="utf-8")
        if entry.get("strict"):
            write_strict(path, entry["implementation"])

    return derived(base, {"__init__": init, "save_pretrained": save_pretrained}, module)


def read_entry(entry: Any) -> tuple[str, Plan]:
    """Name of the implementation, and the plan, from a config's entry.

    Raises:
        InputError: Not an entry.
    """
    name = entry.get("implementation") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not re.fullmatch("mra_[0-9a-f]{8}", name):
        raise InputError(
            f"config.json's '{CONFIG_KEY}' must hold 'implementation' and 'plan' as mra-cli patch "
            f"writes them, got {str(entry)[:80]!r}; patch the original checkpoint again"
        )
    return name, Plan.from_dict(entry.get("plan"))


def write_strict(path: Path, implementation: str) -> None:
    """Make a checkpoint strict, by its config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["attn_implementation"] = implementation + STRICT
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
