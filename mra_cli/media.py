"""Pictures and sounds to measure on, from files."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.inputs import Samples

LONGEST_TRANSCRIPT = 128
"""In tokens, unless said otherwise."""


def media_samples(checkpoint: Checkpoint, paths: Sequence[Path]) -> Samples:
    """One sample per file, prepared as the checkpoint's own ``preprocessor_config.json`` says.

    Decoders of speech models are fed the exact model's own transcript.

    Args:
        paths: Pictures, in what Pillow reads, for models that take pixels; WAV files of the model's
            sampling rate, 8 or 16 bits, for models that take sounds.

    Raises:
        InputError: Not a file of that kind, or the model takes neither, has no such file, or has a
            decoder that it can't write with.
    """
    model, main = checkpoint.model, checkpoint.model.main_input_name
    if main not in ("pixel_values", "input_features", "input_values"):
        raise InputError(
            f"--input is for models that take pictures or sounds; {checkpoint.name} takes {main}; "
            "use --text"
        )
    if model.config.is_encoder_decoder and not model.can_generate():
        raise InputError(
            f"--input needs a model that can write what its decoder is fed; {checkpoint.name} is "
            f"{type(model).__name__}; leave it out, or use a checkpoint with a head that generates"
        )
    digest = hashlib.sha256()
    batches = []
    prepare = _pictures(checkpoint) if main == "pixel_values" else _sounds(checkpoint)
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"can't read {path}: {error.strerror}") from error
        digest.update(content)
        values = prepare(path, io.BytesIO(content))[main]
        batch = {main: values.to(checkpoint.device, checkpoint.dtype)}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = written(checkpoint, batch)
        batches.append(batch)
    names = ", ".join(path.name for path in paths)
    return Samples(batches, names, f"sha256:{digest.hexdigest()[:16]}", 0)


@torch.no_grad()
def written(
    checkpoint: Checkpoint, batch: dict[str, Tensor], longest: int = LONGEST_TRANSCRIPT
) -> Tensor:
    """What the model writes, greedily, of its main input in ``batch``: int64 ``[1, tokens]``, at
    most ``longest`` new ones, or as many as it has positions for."""
    model = checkpoint.model
    room = getattr(model.config, "max_target_positions", longest + 1) - 1
    inputs = {model.main_input_name: batch[model.main_input_name]}
    return model.generate(**inputs, max_new_tokens=min(longest, room), do_sample=False, num_beams=1)


def _pictures(checkpoint: Checkpoint) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow; run pip install 'mra-cli[pictures]'") from error
    processor = _preprocessor(checkpoint, transformers.AutoImageProcessor)

    def prepare(path: Path, content: io.BytesIO) -> Any:
        try:
            with Image.open(content) as picture:
                return processor(picture.convert("RGB"), return_tensors="pt")
        except OSError as error:
            raise InputError(f"{path} must be a picture that Pillow reads: {error}") from error

    return prepare


def _sounds(checkpoint: Checkpoint) -> Any:
    extractor = _preprocessor(checkpoint, transformers.AutoFeatureExtractor)
    rate = extractor.sampling_rate

    def prepare(path: Path, content: io.BytesIO) -> Any:
        try:
            with wave.open(content) as file:
                channels, width, found, *_ = file.getparams()
                frames = file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise InputError(f"{path} must be a WAV file: {error}") from error
        if found != rate or width > 2:
            raise InputError(
                f"{path} must have {rate} samples a second of 8 or 16 bits, got {found} of "
                f"{8 * width}; convert it: ffmpeg -i {path.name} -ar {rate} -c:a pcm_s16le new.wav"
            )
        if not frames or len(frames) % (width * channels):
            raise InputError(f"{path} must hold whole samples, got {len(frames)} bytes of them")
        kind, middle, scale = ("<i2", 0, 32768) if width == 2 else ("u1", 128, 128)
        sound = (np.frombuffer(frames, kind).astype(np.float32) - middle) / scale
        mono = sound.reshape(-1, channels).mean(1)
        return extractor(mono, sampling_rate=rate, return_tensors="pt")

    return prepare


def _preprocessor(checkpoint: Checkpoint, auto_class: Any) -> Any:
    try:
        return auto_class.from_pretrained(checkpoint.path or checkpoint.name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{checkpoint.name} must have a preprocessor_config.json that transformers can use, to "
            f"read files as it was trained to: {str(error).splitlines()[0]}"
        ) from error
