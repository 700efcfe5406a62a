"""Shared fixtures: the demo checkpoints, loaded once; the command line; tiny models to damage."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from safetensors.torch import save_file

import architectures
from cli_support import TEXT, Ran, assert_refused, save_tokenizer
from mra_cli.checkpoint import Checkpoint, load_checkpoint
from mra_cli.cli.main import main
from mra_cli.files import DEMOS, locate

torch.set_num_threads(1)  # workers run side by side

_LONG = "test_readme.py", "test_real_models.py", "test_tasks.py", "test_patch.py", "test_analyze.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG)


# --- demos -----------------------------------------------------------------------------------


def _demo(name: str) -> Checkpoint:
    path = locate(f"demo:{name}")
    if path is None:
        message = f"{DEMOS[name].distribution} is not installed; `make demo` installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return load_checkpoint(f"demo:{name}")


@pytest.fixture(scope="session")
def minilm() -> Checkpoint:
    """all-MiniLM-L6-v2, a BERT encoder: 6 layers, 12 heads, 512 positions."""
    return _demo("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, a causal model: 30 layers, 9 query and 3 key heads."""
    return _demo("smollm2")


# --- running it ------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs a command line in this process."""
    monkeypatch.setenv("COLUMNS", "500")  # boxes that don't break paths into pieces
    monkeypatch.delenv("MRA_DEBUG", raising=False)
    threads = torch.get_num_threads()

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mra-cli", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        return Ran(code, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def refuses(cli, tmp_path):
    """Runs a command line that must fail as the product promises, and say all of ``says``."""
    folder = tmp_path / "out"
    folder.mkdir()

    def run(*arguments, says, code=1):
        ran = cli(*arguments, *([] if "--json" in arguments else ["--json", folder / "it.json"]))
        assert_refused(ran, says, code)
        assert list(folder.iterdir()) == []
        return ran

    return run


# --- models ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Directory of a tiny model by its name in `architectures`, with a tokenizer; don't write."""
    folder = tmp_path_factory.mktemp("models")
    by_name = {entry.name: entry for entry in architectures.ARCHITECTURES}

    def directory(name):
        path = folder / name
        if not path.exists():
            by_name[name].build().save_pretrained(path)
            save_tokenizer(path)
        return path

    return directory


@pytest.fixture(scope="session")
def bert(saved):
    return saved("bert")


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a tiny model, to damage."""

    def directory(name="bert"):
        path = tmp_path / f"{name}-copy"
        shutil.copytree(saved(name), path)
        return path

    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def analyze(refuses, bert, text):
    """A quick `analyze` of the tiny BERT, which must be refused."""

    def run(*arguments, model=bert, **expected):
        defaults = {"--text": text, "--budget": "0.5", "--samples": "1"}
        rest = [x for k, v in defaults.items() if k not in arguments for x in (k, v)]
        return refuses("analyze", model, *rest, *arguments, **expected)

    return run


@pytest.fixture
def pebble(tmp_path):
    """A checkpoint that brings its own code."""
    path = tmp_path / "pebble"
    path.mkdir()
    shutil.copy(Path(__file__).with_name("modeling_pebble.py"), path)
    names = {"AutoConfig": "PebbleConfig", "AutoModel": "PebbleModel"}
    config = {
        "model_type": "pebble",
        "architectures": ["PebbleModel"],
        "auto_map": {auto: f"modeling_pebble.{name}" for auto, name in names.items()},
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"embeddings.weight": (100, 16), "attention.qkv.weight": (48, 16)}
    weights = {name: torch.linspace(-1, 1, a * b).view(a, b) for name, (a, b) in shapes.items()}
    weights["attention.qkv.bias"] = torch.zeros(48)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(path)
    return path
