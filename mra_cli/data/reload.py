"""Run by `mra-cli verify` in a process of its own, in which there is no mra_cli: load a checkpoint
as anyone would, run it, and save what it answers. One argument: the job, a JSON file.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.modules["mra_cli"] = sys.modules["mra_kernels"] = None  # as if not installed

import torch
import transformers
from safetensors.torch import load_file, save_file


def floats(output):
    """The float tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [t for part in parts for t in floats(part)] if isinstance(parts, (list, tuple)) else []


job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(job["threads"])
transformers.logging.set_verbosity_error()
inputs = load_file(job["inputs"])
answers = {}
for name, options in job["runs"].items():
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["path"], **options).eval()
    with torch.no_grad():
        for number, tensor in enumerate(floats(model(**inputs))):
            answers[f"{name} {number:06d}"] = tensor.contiguous().clone()
save_file(answers, job["answers"])
