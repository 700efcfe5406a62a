"""What checkpoints answer in a fresh process that has nothing but transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mra_cli.errors import CheckpointError

_SECONDS = 1800


@dataclass(frozen=True)
class Run:
    """One checkpoint to load and run.

    Attributes:
        path: Its directory.
        auto_class: Name of the transformers class to load it with.
        inputs: Arguments of the model: tensors, and values that JSON can say.
        options: Arguments of ``from_pretrained``.
    """

    path: Path
    auto_class: str
    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


def answers(runs: Mapping[str, Run], *, installed: bool = False) -> dict[str, list[Tensor] | str]:
    """The float tensors of each run's output, or, where it failed, the message.

    Args:
        installed: Leave mra_cli importable; else it is as if it were not installed.

    Raises:
        CheckpointError: The process itself failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        listed = {}
        for number, (name, run) in enumerate(runs.items()):
            tensors = {k: v for k, v in run.inputs.items() if isinstance(v, Tensor)}
            file = place / f"inputs-{number}.safetensors"
            save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, file)
            listed[name] = {
                "path": str(run.path.resolve()),
                "auto_class": run.auto_class,
                "options": dict(run.options),
                "inputs": str(file),
                "arguments": {k: v for k, v in run.inputs.items() if k not in tensors},
            }
        job = {
            "installed": installed,
            "threads": torch.get_num_threads(),
            "runs": listed,
            "answers": str(place / "answers.safetensors"),
            "errors": str(place / "errors.json"),
        }
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        script = files("mra_cli").joinpath("data/reload.py").read_text(encoding="utf-8")
        # Its own cache of modules: no code but that of the directories can run.
        (place / "modules").mkdir()
        modules = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(place / "job.json")],
            env={**os.environ, **modules},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"a fresh Python process can't run transformers: {last}")
        tensors = load_file(place / "answers.safetensors")
        errors = json.loads((place / "errors.json").read_text(encoding="utf-8"))
        return {
            name: errors[name]
            if name in errors
            else [tensors[key] for key in sorted(tensors) if key.rpartition(" ")[0] == name]
            for name in runs
        }
