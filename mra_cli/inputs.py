"""What a model is fed while it is measured: windows of real text, or a file, or plainly synthetic
pictures and sounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError

DEFAULT_TEXT_NAME = "pydoc_data.topics (Python's help texts)"

PROBE_LENGTH = 160
"""Tokens of the dry run: enough that two blocks fit, few enough to be quick."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of a measurement.

    Attributes:
        batches: Arguments of the model, one sample (batch of 1) each.
        source: Where they come from, in words.
        digest: Hash of the text or file.
        length: Tokens (or patches, frames) per sample; the encoder's for encoder-decoders.
        synthetic: They are made up; figures on real inputs may differ.
        parts: Source and number of the batches, in their order, where they have several sources.
    """

    batches: list[dict[str, Tensor]]
    source: str
    digest: str
    length: int
    synthetic: bool = False
    parts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def joined(cls, several: Sequence[Samples]) -> Samples:
        """The samples of several sources, one after the other."""
        if len(several) == 1:
            return several[0]
        digests = " ".join(samples.digest for samples in several)
        return cls(
            batches=[batch for samples in several for batch in samples.batches],
            source=" + ".join(samples.source for samples in several),
            digest="sha256:" + hashlib.sha256(digests.encode()).hexdigest()[:16],
            length=max(samples.length for samples in several),
            synthetic=any(samples.synthetic for samples in several),
            parts=tuple((samples.source, len(samples.batches)) for samples in several),
        )


def default_text() -> str:
    """English with code in it that every Python ships: the language reference's help topics."""
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        InputError: Not there, not text, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} must be UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a text of at least a few hundred words")
    return text


def make_samples(
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    text_name: str = DEFAULT_TEXT_NAME,
    seq_len: int | None = None,
    count: int = 4,
    seed: int = 0,
) -> Samples:
    """Inputs for a checkpoint: windows spread over a text, or synthetic pictures or sounds.

    Args:
        text: For text models; None: `default_text`.
        seq_len: Tokens per sample; None: the most the model takes, at most 512 for encoders and
            1024 for causal models.
        count: Number of samples.
        seed: Chooses the windows, or makes the synthetic inputs.

    Raises:
        InputError: The text is too short, or the model takes fewer positions.
    """
    generator = torch.Generator().manual_seed(seed)
    main = checkpoint.model.main_input_name
    if main == "input_ids":
        return _text_samples(checkpoint, text, text_name, seq_len, count, generator)
    if text is not None or seq_len is not None:
        raise InputError(
            f"--text and --seq-len are for models that take text; {checkpoint.name} takes {main}; "
            "leave them out"
        )
    batches = [_synthetic(checkpoint, main, generator) for _ in range(count)]
    kind = {"pixel_values": "pictures"}.get(main, "sounds")
    return Samples(batches, f"synthetic {kind}, seed {seed}", "none", 0, synthetic=True)


def probe(samples: Samples) -> dict[str, Any]:
    """A short first sample for the dry run; encoder and decoder of different lengths."""
    batch = dict(samples.batches[0])
    for key in ("input_ids", "attention_mask"):
        if key in batch:
            batch[key] = batch[key][:, :PROBE_LENGTH]
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, : PROBE_LENGTH - 32]
    return batch


def dry_run(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `probe` gives, of whatever the model takes; a text model needs no tokenizer for it."""
    model = checkpoint.model
    if model.main_input_name != "input_ids":
        return probe(make_samples(checkpoint, count=1))
    length = min(PROBE_LENGTH, position_limit(checkpoint) or PROBE_LENGTH)
    if checkpoint.tokenizer is not None:
        return probe(make_samples(checkpoint, seq_len=length, count=1))
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, length), generator=generator).to(checkpoint.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if _wants_decoder_ids(model):
        batch["decoder_input_ids"] = ids[:, : length // 2]
    return batch | _picture(checkpoint, generator)


def position_limit(checkpoint: Checkpoint) -> int | None:
    """The longest sequence the model was made for; None: not known."""
    config = checkpoint.model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in checkpoint.model.named_modules():  # RoBERTa counts from its padding index
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    if checkpoint.tokenizer is not None:
        limits.append(checkpoint.tokenizer.model_max_length)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 24]
    return min(known, default=None)


def _text_samples(
    checkpoint: Checkpoint,
    text: str | None,
    text_name: str,
    seq_len: int | None,
    count: int,
    generator: torch.Generator,
) -> Samples:
    if checkpoint.tokenizer is None:
        raise InputError(
            f"{checkpoint.name} must have a tokenizer to be fed text, and has none that loads; "
            "put its tokenizer's files beside its config.json"
        )
    model = checkpoint.model
    text = default_text() if text is None else text
    limit = position_limit(checkpoint)
    wanted = seq_len
    if seq_len is None:
        seq_len = min(512 if not model.can_generate() else 1024, limit or 512)
    if limit is not None and seq_len > limit:
        raise InputError(
            f"{checkpoint.name} has {limit} positions, got --seq-len {seq_len}; use at most {limit}"
        )
    before, after = special_tokens(checkpoint.tokenizer)
    body = seq_len - len(before) - len(after)
    if body < 1:
        raise InputError(f"--seq-len must be over {len(before) + len(after)}, got {seq_len}")
    tokens = checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = min(count, len(tokens) // body)
    if windows == 0:
        advice = "use a longer text" + ("" if wanted is None else " or a smaller --seq-len")
        raise InputError(
            f"the text must have at least {body} tokens for one sample, got {len(tokens)}; {advice}"
        )
    stride = len(tokens) // windows
    batches = []
    for window in range(windows):
        slack = stride - body
        start = window * stride + int(torch.randint(slack + 1, (1,), generator=generator))
        ids = torch.tensor([before + tokens[start : start + body] + after])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if _wants_decoder_ids(model):
            half = max(1, seq_len // 2)
            batch["decoder_input_ids"] = torch.tensor([tokens[start : start + half]])
        batches.append(
            {key: value.to(checkpoint.device) for key, value in batch.items()}
            | _picture(checkpoint, generator)
        )
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]
    source = text_name
    if windows < count:
        source += f" (only {windows} of {count} samples fit)"
    if _wants_decoder_ids(model):
        source += "; the decoder is fed the first half of each again"
    return Samples(batches, source, digest, seq_len)


def _wants_decoder_ids(model: PreTrainedModel) -> bool:
    """Encoder-decoders do, but for those with a classifier on top, which make their own."""
    classifies = "For" in type(model).__name__ and not model.can_generate()
    return bool(model.config.is_encoder_decoder) and not classifies


def _picture(checkpoint: Checkpoint, generator: torch.Generator) -> dict[str, Tensor]:
    """A made-up picture for models that want one beside the text (CLIP), else nothing."""
    model = checkpoint.model
    if model.can_generate() or not hasattr(model.config, "vision_config"):
        return {}
    return _synthetic(checkpoint, "pixel_values", generator)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _synthetic(checkpoint: Checkpoint, main: str, generator: torch.Generator) -> dict[str, Tensor]:
    """One made-up picture or sound in the shape the model takes."""
    config = checkpoint.model.config
    vision = getattr(config, "vision_config", config)
    if main == "pixel_values":
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        values = _smooth_noise((channels, height, width), generator)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        values = _smooth_noise((config.num_mel_bins, 2 * config.max_source_positions), generator)
    elif main == "input_values" and hasattr(config, "num_mel_bins"):
        values = _smooth_noise((config.max_length, config.num_mel_bins), generator)
    elif main == "input_values":
        values = torch.randn(16000 * 4, generator=generator)
    else:
        raise InputError(
            f"{type(checkpoint.model).__name__} must take input_ids, pixel_values, input_features "
            f"or input_values; it takes {main}"
        )
    batch = {main: values[None].to(checkpoint.device, checkpoint.dtype)}
    if config.is_encoder_decoder:
        vocabulary = config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (1, 64), generator=generator)
        batch["decoder_input_ids"] = ids.to(checkpoint.device)
    return batch


def _smooth_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with frequency, as in natural pictures; mean 0, deviation 1."""
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    rows = torch.fft.fftfreq(shape[-2])[:, None] * shape[-2]
    cols = torch.fft.rfftfreq(shape[-1])[None] * shape[-1]
    spectrum = spectrum / (1 + (rows**2 + cols**2).sqrt())
    noise = torch.fft.irfft2(spectrum, s=shape[-2:])
    return (noise - noise.mean()) / noise.std()
