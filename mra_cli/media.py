"""Pictures and sounds to measure on, from files."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.inputs import Samples

_LONGEST = 128
"""Tokens of a transcript that the decoder is fed."""


def media_samples(checkpoint: Checkpoint, paths: Sequence[Path]) -> Samples:
    """One sample per file, prepared as the checkpoint's own ``preprocessor_config.json`` says.

    Decoders of speech models are fed the exact model's own transcript.

    Args:
        paths: Pictures, in what Pillow reads, for models that take pixels; WAV files of the model's
            sampling rate, 8 or 16 bits, for models that take sounds.

    Raises:
        InputError: Not a file of that kind, or the model takes neither, or has no such file.
    """
    model, main = checkpoint.model, checkpoint.model.main_input_name
    if main not in ("pixel_values", "input_features", "input_values"):
        raise InputError(
            f"--input is for models that take pictures or sounds; {checkpoint.name} takes {main}; "
            "use --text"
        )
    digest = hashlib.sha256()
    batches = []
    prepare = _pictures(checkpoint) if main == "pixel_values" else _sounds(checkpoint)
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise InputError(f"can't read {path}: {error.strerror}") from error
        values = prepare(path)[main].to(checkpoint.device, checkpoint.dtype)
        batch = {main: values}
        if model.config.is_encoder_decoder:
            room = getattr(model.config, "max_target_positions", _LONGEST + 1) - 1
            with torch.no_grad():
                batch["decoder_input_ids"] = model.generate(
                    values, max_new_tokens=min(_LONGEST, room), do_sample=False, num_beams=1
                )
        batches.append(batch)
    names = ", ".join(path.name for path in paths)
    return Samples(batches, names, f"sha256:{digest.hexdigest()[:16]}", 0)


def _pictures(checkpoint: Checkpoint) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow; run pip install 'mra-cli[pictures]'") from error
    processor = _preprocessor(checkpoint, AutoImageProcessor)

    def prepare(path: Path) -> Any:
        try:
            with Image.open(path) as picture:
                return processor(picture.convert("RGB"), return_tensors="pt")
        except OSError as error:
            raise InputError(f"{path} must be a picture that Pillow reads: {error}") from error

    return prepare


def _sounds(checkpoint: Checkpoint) -> Any:
    extractor = _preprocessor(checkpoint, AutoFeatureExtractor)
    rate = extractor.sampling_rate

    def prepare(path: Path) -> Any:
        try:
            with wave.open(str(path)) as file:
                found, width, channels = (
                    *(file.getframerate(), file.getsampwidth(), file.getnchannels()),
                )
                frames = file.readframes(file.getnframes())
        except (OSError, wave.Error, EOFError) as error:
            raise InputError(f"{path} must be a WAV file: {error}") from error
        if found != rate or width > 2:
            raise InputError(
                f"{path} must have {rate} samples a second of 8 or 16 bits, got {found} of "
                f"{8 * width}; convert it: ffmpeg -i {path.name} -ar {rate} -c:a pcm_s16le new.wav"
            )
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
