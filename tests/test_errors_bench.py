"""Refused by `bench` and `env`: options that don't go together, values, files, missing packages."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch


@pytest.fixture
def bench(refuses):
    """A quick `bench` that must be refused."""

    def run(*arguments, **expected):
        return refuses("bench", *arguments, **expected)

    return run


@pytest.mark.parametrize("length", ["0", "-5", "many", "", "512,,1024", "512,0", "1e3", "1.5"])
def test_lengths(bench, length):
    says = ["--seq-len", "like 512,1024", f"got '{length}'"]
    bench(f"--seq-len={length}", code=2, says=says)


@pytest.mark.parametrize(
    "option", ["--heads", "--kv-heads", "--head-dim", "--batch", "--threads", "--pairs", "--rows"]
)
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts(bench, option, value):
    bench(
        f"{option}={value}",
        code=2,
        says=[option, "at least 1|greater than or equal to 1|valid int"],
    )


@pytest.mark.parametrize("pattern", ["XX", "NS,", "self", "", "NSCS"])
def test_patterns(bench, pattern):
    got = pattern.split(",")[-1].upper()
    says = ["--pattern must be some of NS .*CS .*NC .*CC", f"got '{got}'"]
    bench(f"--pattern={pattern}", says=says)


def test_heads_that_cannot_share(bench):
    bench("--heads", "8", "--kv-heads", "3", says=["must divide --heads", "got 3 and 8", "use"])


@pytest.mark.parametrize(("names", "got"), [("mra8", "mra8"), ("mra,mra9", "mra9"), ("ALL", "ALL")])
def test_methods(bench, names, got):
    bench("--method", names, says=["method must be one of", f"got '{got}'", "did you mean"])


def test_implementations(bench):
    bench("--impl", "magic", says=["--impl must be one of .*reference", "got 'magic'"])


def test_an_implementation_that_is_not_usable_here(bench, monkeypatch):
    known = {"native": "native needs a C++ compiler; install one", "reference": None}
    monkeypatch.setattr("mra_cli.methods.implementations", lambda: known)
    bench("--impl", "native", says=["--impl native can't be used here", "C[+][+].*install"])


def test_native_has_no_gradients(bench, monkeypatch):
    monkeypatch.setattr("mra_cli.methods.implementations", lambda: {"native": None})
    arguments = ("--impl", "native", "--backward", "--seq-len", "64")
    bench(*arguments, says=["nothing to run", "no gradients", "--dry-run"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["some/model", "--heads", "4"], ["--heads", "MODEL is timed whole", "leave it out"]),
        (["some/model", "--pattern", "NS"], ["--pattern", "single calls"]),
        (["some/model", "--decode"], ["--decode", "single calls"]),
        (["some/model", "--backward"], ["--backward", "single calls"]),
        (["some/model", "--inputs", "other"], ["--inputs", "single calls"]),
        (["some/model", "--keys-per-row", "64"], ["--keys-per-row", "single calls"]),
        (["--inputs", "some/model", "--head-dim", "8"], ["--head-dim", "random inputs"]),
        (["--inputs", "some/model", "--pattern", "NS"], ["--pattern", "random inputs"]),
        (["--layers", "1"], ["--layers", "needs a MODEL, or --inputs"]),
        (["--trust-remote-code"], ["--trust-remote-code", "needs a MODEL"]),
        (["--new-tokens", "4"], ["--new-tokens", "whole models"]),
        (["--rows", "2"], ["--rows", "needs --decode"]),
        (["--decode", "--backward"], ["--backward", "can't go with --decode"]),
    ],
)
def test_options_that_do_not_go_together(bench, arguments, says):
    bench(*arguments, code=2, says=says)


@pytest.mark.parametrize("budget", ["0", "1.5", "abc"])
def test_budgets(bench, budget):
    bench("--budget", budget, code=2, says=["--budget", f"got '?{budget}"])


@pytest.mark.parametrize("dtype", ["float8", ""])
def test_dtypes(bench, dtype):
    bench(f"--dtype={dtype}", says=["dtype must be one of float32", f"got '{dtype}'"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there(bench):
    bench("--device", "cuda", says=["device", "got 'cuda'", "--device cpu"])


def test_nothing_that_could_run(bench):
    says = ["nothing to run", "4 queries are less than two blocks", "--dry-run"]
    bench("--seq-len", "4,8", says=says)
    bench("--decode", "--pattern", "NS", says=["nothing to run", "has no decoding", "use CS"])
    bench("--decode", "--rows", "64", "--seq-len", "32,64", says=["less than the cache", "got 64"])


def test_models_that_are_not_there(bench):
    bench("/no/such/model", says=["no such file or directory: /no/such/model"])
    bench("--inputs", "/no/such/model", says=["no such file or directory: /no/such/model"])


def test_pictures_are_no_inputs_of_chosen_length(bench, saved):
    says = ["--inputs must be a model that takes text", "pixel_values", "mra-cli bench"]
    bench("--inputs", saved("vit"), says=says)


def test_too_long_for_the_model(bench, bert):
    says = ["nothing to run", "has 128 positions"]
    bench("--inputs", bert, "--seq-len", "129,200", says=says)
    bench(bert, "--seq-len", "129,200", says=says)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_files_that_cannot_be_written(bench, monkeypatch, tmp_path, option):
    monkeypatch.setattr("mra_cli.bench.single.run_bench", lambda *a, **k: pytest.fail("ran"))
    path = tmp_path / "missing" / "it.png"
    says = [option, "can't write", re.escape(str(path)), "no such file"]
    bench(option, path, code=2, says=says)


@pytest.mark.parametrize("name", ["it.pdf", "it", "png"])
def test_drawings_in_other_formats(bench, tmp_path, name):
    bench("--plot", tmp_path / name, code=2, says=["--plot", r"\.png or \.svg", f"got .*{name}"])


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_only_json_goes_to_stdout(bench, option):
    bench(option, "-", code=2, says=[option, "only --json", "name a file"])


def test_one_file_for_two_things(bench, tmp_path):
    path = tmp_path / "it.png"
    bench("--csv", path, "--plot", path, code=2, says=["file of its own"])


def test_drawing_without_matplotlib(bench, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    without = lambda name, *rest: None if name == "matplotlib" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("mra_cli.bench.single.run_bench", lambda *a, **k: pytest.fail("ran"))
    says = ["--plot needs .*matplotlib", r"pip install 'mra-cli\[plot\]'"]
    bench("--plot", tmp_path / "it.png", says=says)
    assert list(tmp_path.glob("*.png")) == []


def test_matplotlib_is_only_imported_for_a_drawing(cli, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    line = "--seq-len 64,65 --pattern NS --heads 1 --pairs 1 --budget 1"
    ran = cli("bench", *line.split())
    assert ran.code == 0, ran


def test_env_refuses_a_file_that_cannot_be_written(refuses, tmp_path):
    refuses("env", "--json", tmp_path / "no" / "it.json", code=2, says=["--json", "can't write"])
