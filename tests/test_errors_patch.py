"""Refused: what `patch`, `verify` and `run` can't take: one line each, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_support import save_tokenizer

QUICK = ("--no-measure", "--budget", "0.5")


@pytest.fixture
def patch(refuses, bert, tmp_path):
    """A `patch` of the tiny BERT that must be refused, and leave no directory."""

    def run(*arguments, model=bert, out=tmp_path / "patched", **expected):
        before = sorted(tmp_path.rglob("*"))
        target = () if out is None else ("--out", out)
        refuses("patch", model, *target, *QUICK[:1], *arguments, **expected)
        new = [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name != "out"]
        assert new == [], "left behind"

    return run


@pytest.fixture
def done(cli, bert, tmp_path):
    """A patched checkpoint, to damage."""
    path = tmp_path / "done"
    assert cli("patch", bert, "--out", path, "--copy", *QUICK).code == 0
    return path


def rewritten(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- where to ---------------------------------------------------------------------------------


def test_nowhere_to_write(patch):
    patch(out=None, code=2, says=["--out", "say where to write, or pass --dry-run"])


def test_a_directory_that_is_there(patch, done):
    patch(out=done, says=["--out must be a new directory", "which is there", "pass --force"])


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_directory_of_yours_is_never_replaced(patch, tmp_path, force):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    says = ["no patched checkpoint", "never replaced", "choose another name"]
    patch(*force, out=tmp_path / "mine", says=says)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_file(patch, text):
    patch(out=text, says=["--out must be a directory to make", "got the file .*words.txt"])


def test_no_such_parent(patch, tmp_path):
    patch(out=tmp_path / "a" / "b", says=["--out must lie in a directory", "none", "make it"])


def test_a_read_only_place(patch):
    patch(out="/proc/patched", says=["can't write /proc/patched"])


@pytest.mark.parametrize("inside", ["", "inside", ".."])
def test_the_source_itself_or_inside_or_around(patch, copy, inside):
    source = copy()
    if inside == "..":
        source = source.rename(source.parent / "x")
        (source.parent / "y").mkdir()
        shutil.move(source, source.parent / "y" / "x")
        source = source.parent / "y" / "x"
        (source.parent / "mra_manifest.json").write_text("{}")
    target = source / inside
    says = ["apart from the source|no patched checkpoint"]
    patch("--force", model=source, out=target, says=says)


# --- what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--budget", "0.1,0.2"), 2, ["--budget", "one number", "got 0.1,0.2"]),
        (("--budget", "2"), 2, ["--budget", r"\(0, 1\]"]),
        (("--min-length", "-1"), 2, ["--min-length"]),
        (("--method", "mra8"), 1, ["method must be one of", "did you mean 'mra.?'"]),
        (("--layers", "7"), 1, ["--layers must name patchable sites", "got '7'"]),
        (("--set", "coarse"), 2, ["--set", "KEY=VALUE"]),
        (("--plan", "no-such.json"), 1, ["can't read", "no-such.json", "no such file"]),
        (("--samples", "0"), 2, ["--samples"]),
        (("--text", "no-such.txt"), 1, ["can't read the text no-such.txt"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options(patch, arguments, code, says):
    patch(*arguments, code=code, says=says)


def test_text_that_can_not_be_measured_on(refuses, bert, tmp_path):
    """Asked for, it must be done; else it may be left out."""
    (tmp_path / "short.txt").write_text("the a")
    arguments = ("--text", tmp_path / "short.txt", "--out", tmp_path / "x")
    refuses("patch", bert, *arguments, says=["the text must have at least", "longer text"])
    assert not (tmp_path / "x").exists()


def test_a_model_too_short_to_approximate(patch, copy):
    source = copy()
    rewritten(source / "config.json", lambda c: c.update(max_position_embeddings=48))
    weights = load_file(source / "model.safetensors")
    name = "embeddings.position_embeddings.weight"
    from safetensors.torch import save_file

    save_file(weights | {name: weights[name][:48].clone()}, source / "model.safetensors")
    patch(model=source, says=["at least one attention site must be patchable", "nothing to gain"])


# --- plans -----------------------------------------------------------------------------------

SITE = "encoder.layer.0.attention.self"
GOOD = {"method": "mra", "budget": 0.5}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ["is empty"]),
        ("{", ["must be JSON"]),
        ("[]", ["'schema' and 'sites'"]),
        ('{"sites": {}}', ["'schema' and 'sites'"]),
        ({"schema": 2, "sites": {}}, ["schema must be 1, got 2", "update mra-cli"]),
        ({"schema": 1, "sites": {}}, ["at least one attention site, got none"]),
        ({"schema": 1, "sites": {SITE: 7}}, [SITE, "must have 'method' and 'budget'"]),
        ({"schema": 1, "sites": {SITE: {"method": "mra"}}}, [SITE, "'budget'"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "budget": "x"}}}, [SITE, "number for 'budget'"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "budget": 3}}}, [SITE, r"\(0, 1\], got 3"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "method": "fnet"}}}, [SITE, "did you mean"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "colour": "red"}}}, [SITE, "got 'colour'"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "tail": "red"}}}, [SITE, "got 'red'"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "first_keys": "x"}}}, [SITE, "first_keys"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "first_keys": [1]}}}, [SITE, "first_keys"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "budget": True}}}, [SITE, "number for 'budget'"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "head_budgets": 4}}}, [SITE]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "min_length": -1}}}, [SITE, "min_length"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "grid": [0, 1]}}}, [SITE, "grid"]),
        ({"schema": 1, "sites": {SITE: {**GOOD, "is_cross": 1}}}, [SITE, "is_cross"]),
        ({"schema": 1, "sites": {"layers.0": GOOD}}, ["BertModel, which has no layers.0", "check"]),
        ({"schema": 1, "sites": {"embeddings": GOOD}}, ["BertModel, which has no embeddings"]),
        ({"by_budget": [], "schema": 1}, ["not a report of mra-cli analyze"]),
    ],
)
def test_plans(patch, tmp_path, content, says):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    patch("--plan", path, says=says)


@pytest.mark.parametrize("other", [("--method", "mra"), ("--layers", "0"), ("--set", "a=b")])
def test_a_plan_and_what_it_says_already(patch, tmp_path, other):
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "sites": {SITE: GOOD}}))
    patch("--plan", tmp_path / "plan.json", *other, code=2, says=["--plan", "leave out"])


def test_a_plan_and_a_budget(patch, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "sites": {SITE: GOOD}}))
    says = ["has budgets of its own", "leave out --budget"]
    patch("--plan", tmp_path / "plan.json", "--budget", "0.3", says=says)


def test_a_report_with_several_budgets(cli, patch, bert, text, tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--text", text, "--samples", "1", "--budget", "0.3,0.6", "--layers", "1")
    assert cli("analyze", bert, *arguments, "--json", report).code == 0
    patch("--plan", report, says=["has the budgets 0.3, 0.6, got none", "choose one"])
    patch("--plan", report, "--budget", "0.4", says=["has the budgets 0.3, 0.6, got 0.4"])


# --- sources ---------------------------------------------------------------------------------


def test_no_such_model(patch):
    patch(model="/no/such/dir", says=["no such file or directory"])
    patch(model="no-such-owner/no-such-model", says=["no such model", "hub"])


def test_a_pickle(patch, copy):
    source = copy()
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    patch(model=source, says=["in a pickle", "run code", "--allow-pickle"])


def test_a_pickle_with_consent(cli, copy, tmp_path):
    source = copy()
    weights = load_file(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    out = tmp_path / "x"
    ran = cli("patch", source, "--out", out, "--allow-pickle", *QUICK)
    assert ran.code == 0, ran
    assert (out / "pytorch_model.bin").stat().st_ino == (source / "pytorch_model.bin").stat().st_ino


def test_a_pickle_in_a_part(patch, copy):
    source = copy()
    (source / "2_Dense").mkdir()
    torch.save({}, source / "2_Dense" / "pytorch_model.bin")
    patch(model=source, says=["2_Dense/pytorch_model.bin is a pickle", "--allow-pickle"])


def test_code_of_its_own(patch, pebble):
    patch(model=pebble, says=["Python code of its own", "--trust-remote-code"])


def test_code_of_its_own_with_consent_is_still_no_class_of_transformers(patch, pebble):
    says = ["must be of a class of transformers", "PebbleModel", "mra_cli.patching.patched"]
    patch("--trust-remote-code", model=pebble, says=says)


def test_attention_of_its_own(patch, saved):
    patch(model=saved("mpnet"), says=["MPNetModel must send its attention through"])


def test_a_damaged_shard(patch, copy):
    source = copy()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    patch(model=source, says=["truncated or damaged", "download it again"])


# --- verify and run --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "run"])
def test_not_patched(refuses, bert, command):
    says = ["must be a patched checkpoint", "mra-cli patch MODEL --out DIR"]
    refuses(command, bert, *(["hello"] if command == "run" else []), says=says)


@pytest.mark.parametrize("command", ["verify", "run"])
def test_not_there(refuses, command):
    arguments = [command, "/no/such", *(["hello"] if command == "run" else [])]
    refuses(*arguments, says=["/no/such"])


@pytest.mark.parametrize("value", ["0", "1.5", "-1", "nan"])
def test_a_recovery_that_is_none(refuses, done, value):
    refuses("verify", done, "--min-recovery", value, says=["--min-recovery must be in", value])


@pytest.mark.parametrize(
    "content",
    ["{", "{}", "[]", '{"schema": 9}', '{"schema": 1}', '{"schema": 1, "files": [], "figures": 0}'],
)
def test_a_damaged_manifest(refuses, done, content):
    (done / "mra_manifest.json").write_text(content)
    refuses("verify", done, says=["mra_manifest.json", "damaged|must have schema 1"])


def test_an_entry_that_is_none(refuses, done):
    rewritten(done / "config.json", lambda c: c.update(mra={"plan": {}}))
    says = ["'mra' must hold 'implementation' and 'plan'", "patch the original"]
    refuses("run", done, "hello", says=says)


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt(refuses, done, prompt):
    refuses("run", done, prompt, says=["prompt must not be empty"])


def test_no_chat_template(refuses, done):
    refuses("run", done, "hello", "--chat", says=["no chat template", "leave out --chat"])


def test_a_model_that_takes_no_text(cli, refuses, saved, tmp_path):
    out = tmp_path / "vit"
    assert cli("patch", saved("vit"), "--out", out, *QUICK).code == 0
    refuses("run", out, "hello", says=["takes pixel_values", "mra_cli.load"])


def test_no_tokenizer(cli, refuses, saved, tmp_path):
    source, out = tmp_path / "source", tmp_path / "x"
    shutil.copytree(saved("bert"), source)
    for file in source.glob("*token*"):
        file.unlink()
    assert cli("patch", source, "--out", out, "--budget", "0.5").code == 0
    assert "Not measured" in (out / "README.md").read_text()
    refuses("run", out, "hello", says=["have a tokenizer"])
    refuses("verify", out, "--min-recovery", "0.9", says=["must have a tokenizer"])
    save_tokenizer(source)
