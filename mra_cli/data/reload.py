"""Load checkpoints as anyone would, run them, and save what they answer.

Run by `mra_cli.fresh` in a process of its own, in which (unless the job says otherwise) there is
no mra_cli. One argument: the job, a JSON file.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
# transformers puts its cache of modules behind all other places, of which one that Python was told
# of (PYTHONPATH) may hold an older cache.
sys.path.insert(0, os.environ["HF_MODULES_CACHE"])
if not job["installed"]:
    sys.modules["mra_cli"] = sys.modules["mra_kernels"] = None

import torch
import transformers
from safetensors.torch import load_file, save_file


def floats(output):
    """The float tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = list(output.values()) if isinstance(output, Mapping) else output
    return [t for part in parts for t in floats(part)] if isinstance(parts, (list, tuple)) else []


def loaded(run):
    """The model, by transformers alone."""
    auto_class = getattr(transformers, run["auto_class"])
    return auto_class.from_pretrained(run["path"], **run["options"]).eval()


torch.set_num_threads(job["threads"])
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
answers, errors = {}, {}
for name, run in job["runs"].items():
    try:
        model = loaded(run)
        with torch.no_grad():
            output = model(**load_file(run["inputs"]), **run["arguments"])
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
        continue
    for number, tensor in enumerate(floats(output)):
        answers[f"{name} {number:06d}"] = tensor.contiguous().clone()
save_file(answers, job["answers"])
Path(job["errors"]).write_text(json.dumps(errors), encoding="utf-8")
