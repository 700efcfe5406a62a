"""Refused: targets, texts, states and files of `search`, tasks and pages of `analyze`."""

from __future__ import annotations

import json

import pytest

POSITIONS = 128


@pytest.fixture
def search(refuses, bert, text, tmp_path):
    """A quick `search` of the tiny BERT, which must be refused."""

    def run(*arguments, model=bert, **expected):
        plan = tmp_path / "plan.json"
        given = [] if "--min-cosine" in arguments or "-" in arguments else ["--min-cosine", "0.5"]
        defaults = {"--text": text, "--out": plan, "--samples": "1", "--budget": "0.5"}
        rest = [x for k, v in defaults.items() if k not in arguments for x in (k, v)]
        ran = refuses(
            "search", model, *given, *rest, *(a for a in arguments if a != "-"), **expected
        )
        assert not plan.exists()
        return ran

    return run


def test_the_search_used_here_is_good(cli, bert, text, tmp_path):
    """Else the refusals of this file would prove nothing."""
    plan = tmp_path / "plan.json"
    options = ["--text", text, "--samples", "1", "--budget", "0.5", "--out", plan]
    ran = cli("search", bert, "--min-cosine", "0.5", *options)
    assert ran.code == 0, ran
    assert set(json.loads(plan.read_text())["sites"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.json.state"]


def test_nothing_to_hold(search):
    search("-", code=2, says=["name what has to hold", "--max-loss-increase", "--density"])


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--min-agreement", "101%", "between 0 and 1"),
        ("--min-agreement", "most", "share like 1% or 0.01"),
        ("--max-loss-increase", "-1%", "over 0"),
        ("--max-loss-increase", "nan", "over 0"),
        ("--density", "0", "between 0 and 1"),
        ("--density", "1.5", "between 0 and 1"),
        ("--max-kl", "-0.1", "over 0"),
        ("--save", "money", "density or latency"),
        ("--time-limit", "soon", "like 90s, 10m or 2h"),
        ("--time-limit", "-5s", "like 90s, 10m or 2h"),
        ("--budget", "2", r"fraction in \(0, 1\]"),
        ("--budget", "1", "one must be under 1"),
    ],
)
def test_values_out_of_range(search, option, value, says):
    search(option, value, code=2, says=[option, says])


@pytest.mark.parametrize("value", ["0", "1", "-1", "1.5"])
def test_cosines_out_of_range(search, value):
    search("--min-cosine", value, code=2, says=["--min-cosine", "between 0 and 1"])


def test_targets_of_other_models(search, text):
    search("--max-kl", "0.1", says=["has no KL", "use --min-cosine or --density"])


def test_the_same_text_on_both_sides(search, text):
    search("--held-out", text, says=["--held-out must be text that --text does not have"])


def test_a_text_too_short_to_halve(search, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    search("--text", short, says=["text must have at least", "got"])


def test_states_of_another_search(search, bert, text, tmp_path, cli):
    plan = tmp_path / "other.json"
    options = ["--text", text, "--samples", "1", "--out", plan, "--min-cosine", "0.5"]
    assert cli("search", bert, *options, "--budget", "0.5").code == 0
    state = tmp_path / "other.json.state"
    search("--state", state, "--budget", "0.25", says=["another budgets", "delete it, or name"])
    state.write_text("[]")
    search("--state", state, says=["must be the state of a search"])


@pytest.mark.parametrize("option", ["--out", "--state", "--html", "--plot"])
def test_files_that_cannot_be_written(search, option, tmp_path):
    target = tmp_path / "missing" / "it.png"
    search(option, target, code=2, says=[option, "can't write", "No such file"])


def test_files_of_the_same_name(search, tmp_path):
    target = tmp_path / "it.html"
    search("--html", target, "--out", target, code=2, says=["a file of its own"])


def test_drawings_of_another_kind(search, tmp_path):
    search("--plot", tmp_path / "it.gif", code=2, says=[r"ends in \.png or \.svg"])


# --- of analyze ------------------------------------------------------------------------------


def test_tasks_that_are_none(analyze):
    analyze("--task", "juggling", says=["must be one of needles, ranking, transcript"])
    analyze("--task", "needles", says=["causal language models", "leave it out"])


def test_pages_that_cannot_be_written(analyze, tmp_path):
    analyze("--html", tmp_path / "missing" / "it.html", code=2, says=["--html", "can't write"])
    analyze("--html", "-", code=2, says=["only --json goes to stdout"])
