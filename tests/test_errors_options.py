"""Refused: values of options (lengths, texts, budgets, methods, settings, layers, devices)."""

from __future__ import annotations

import json
import re

import pytest
import torch

from cli_support import TEXT, WORDS

POSITIONS = 128  # of every model in `architectures`


def test_the_models_and_texts_used_here_are_good(cli, bert, text, tmp_path):
    """Else the refusals of these files would prove nothing."""
    target = tmp_path / "it.json"
    arguments = ("--text", text, "--budget", "0.5", "--samples", "1", "--layers", "0")
    ran = cli("analyze", bert, *arguments, "--json", target)
    assert ran.code == 0, ran
    assert "Traceback" not in ran.err
    assert json.loads(target.read_text())["by_budget"][0]["budget"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]
    assert len(json.loads(cli("check", bert, "--json", "-").out)["sites"]) == 2


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


@pytest.mark.parametrize("option", ["--text", "--seq-len"])
def test_a_model_of_pictures_takes_no_text(cli, refuses, saved, text, option):
    """Nor a length; it is measured without either."""
    arguments = ("analyze", saved("vit"), "--budget", "0.5", "--samples", "1")
    value = {"--text": text, "--seq-len": "64"}[option]
    says = [f"{option} .*for models that take text", "vit takes pixel_values", "leave them out"]
    refuses(*arguments, option, value, says=says)
    ran = cli(*arguments)
    assert ran.code == 0, ran


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan", "0.1,2"])
def test_budgets_out_of_range(analyze, budget):
    analyze("--budget", budget, code=2, says=["--budget", r"\(0, 1\]", f"got {budget}"])


@pytest.mark.parametrize("budget", ["abc", "", "0.1,,0.5", "0.1 0.5"])
def test_budgets_that_are_no_numbers(analyze, budget):
    says = ["--budget", "numbers like 0.1,0.25,0.5", f"got '{budget}'"]
    analyze("--budget", budget, code=2, says=says)


@pytest.mark.parametrize(
    ("name", "near"), [("mra4", r"mra\w*"), ("mr2s", "mra2s"), ("MRA2", "mra2"), ("", r"\w+")]
)
def test_an_unknown_method_names_the_nearest(analyze, name, near):
    known = "must be one of .*mra, mra2, mra2s, mra3"
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
        ("blocks_per_row=0", ["has the settings .*coarse.*score", "got 'blocks_per_row'", "leave"]),
    ],
)
def test_settings_out_of_range(analyze, pair, says):
    analyze("--method", "mra3", "--set", pair, says=says)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("ranks=3", ["has the settings rows, rank, tail", "got 'ranks'", "did you mean 'rank'"]),
        ("rank=0", ["rank must be at least 1", "got 0"]),
        ("rows=x", ["rows must be a number", "got 'x'"]),
        ("tail=none", ["tail must be one of tilted, pooled", "got 'none'"]),
        ("first_keys=-1", ["first_keys must be at least 0", "got -1"]),
        ("head_budgets=0.5,2", [r"budget must be in \(0, 1\]", "got 2.0"]),
        ("head_budgets=0.5,x", ["head_budgets must be .*numbers like 0.1,0.5", "got '0.5,x'"]),
        ("head_budgets=0.5,0.1", ["head_budgets must stand alone", "leave one out"]),
    ],
)
def test_settings_of_the_default_method_out_of_range(analyze, pair, says):
    analyze("--set", pair, says=says)


@pytest.mark.parametrize(
    "layers", ["99", "2-5", "0-9", "9-3", "1-0", "a-b", "0,99", "0-", "-1", "", ",", "²"]
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
