"""README's commands and code are run; its output is compared with a fresh one.

``python tests/test_readme.py`` puts a fresh output into README.md.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mra_cli.methods import METHODS, REFUSED
from mra_cli.methods.mra import Mra

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OUTPUT = re.compile(
    r"(?<=^```console\n\$ mra-cli analyze demo:minilm\n).*?(?=^```$)", re.DOTALL | re.MULTILINE
)
METHODS_TABLE = re.compile(r"(?<=<!-- methods -->\n).*?(?=<!-- /methods -->)", re.DOTALL)
SITE_ROW = re.compile(r"│ (\d+) │ (\S+) +│ \w+ +│ +[\d.]+ │(.*)│$", re.MULTILINE)
ERROR_AND_MASS = re.compile(r"([\d.]+) +(\d+)% +[\d.]+")


def commands() -> list[str]:
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def mra_cli(arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mra_cli", *shlex.split(arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_every_block_is_closed():
    """And what explains the output is there: putting in a fresh one must not eat its neighbours."""
    inside = False
    for line in README.read_text().splitlines():
        if line.startswith("```"):
            assert (line == "```") == inside, line
            inside = not inside
    assert not inside
    text = README.read_text()
    for part in ("**The first table**", "**The verdict**", "\n## Commands\n", "\n## Patch\n"):
        assert text.count(part) == 1


def test_a_fresh_output_replaces_only_the_old_one():
    text = README.read_text()
    once = OUTPUT.sub("new\n", text, count=1)
    assert OUTPUT.findall(once) == ["new\n"]
    assert len(text) - len(once) == len(OUTPUT.findall(text)[0]) - len("new\n")


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [command.split()[1] for command in commands() if command.startswith("make ")]
    known = {"demo", "test", "lint", "test-slow", "test-kernels", "test-gpu"}
    assert known == set(named) <= set(targets)
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


_METHOD_COLUMNS = ["method", "what it does", "training-free", "causal", "cross", "masks"]
_METHOD_COLUMNS += ["budget of", "work", "source"]


def methods_table() -> str:
    """Every method, as it describes itself."""
    lines = [
        f"| {' | '.join(names)} |" for names in (_METHOD_COLUMNS, ["---"] * len(_METHOD_COLUMNS))
    ]
    masks = {"any": "any", "causal": "causal, padding", "padding": "padding"}
    for about in dict.fromkeys(method.about for method in METHODS.values()):
        names = [name for name, method in METHODS.items() if method.about == about]
        causal = cross = "no"
        if "CS" in about.patterns:
            causal = "yes, chooses by later tokens" if about.looks_ahead else "yes"
        if "NC" in about.patterns:
            cross = "yes" if "CC" in about.patterns else "noncausal"
        cells = [
            ", ".join(f"`{name}`" for name in names),
            about.summary + (f" ({about.adapted})" if about.adapted else ""),
            "needs `calibrate`" if about.calibrated else "yes",
            causal,
            cross,
            masks[about.masks],
            about.budgets,
            about.cost,
            about.source,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_methods_is_what_they_say():
    text = README.read_text()
    assert METHODS_TABLE.findall(text) == [methods_table()]
    assert {type(method) for method in METHODS.values()} > {Mra}
    for name in METHODS:
        assert f"`{name}`" in methods_table()
    for name in REFUSED:
        assert re.search(name, text, re.IGNORECASE), name


@pytest.mark.checkpoints
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, marks=[pytest.mark.slow] if re.search("smollm2|--task", c) else [])
        for c in commands()
        if c.startswith(("mra-cli check", "mra-cli analyze", "mra-cli compare", "mra-cli explain"))
        and "calibration=" not in c  # see `test_calibrate_and_fold_run_as_shown`
    ],
)
def test_commands_run(command, tmp_path, minilm):
    done = mra_cli(command.removeprefix("mra-cli "), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200
    assert "demo:" in done.stdout or "demo:" not in command
    named = re.findall(r"--(?:json|plot|html) (\S+)", command)
    assert {path.name for path in tmp_path.iterdir()} == set(named)


@pytest.mark.slow
@pytest.mark.checkpoints
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("mra-cli search")])
def test_searches_find_plans(command, tmp_path, minilm):
    done = mra_cli(command.removeprefix("mra-cli "), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "A plan keeps" in done.stdout
    named = set(re.findall(r"--(?:html|plot) (\S+)", command))
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "plan.json.state", *named}


@pytest.mark.checkpoints
@pytest.mark.slow
def test_calibrate_and_fold_run_as_shown(tmp_path, minilm):
    """One command after the other, in one directory."""
    shown = [c for c in commands() if c.split()[1] in ("calibrate", "fold") or "calibration=" in c]
    assert len(shown) == 6
    for command in shown:
        done = mra_cli(command.removeprefix("mra-cli "), tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"minilm-folded", "minilm-tff.safetensors"}


@pytest.mark.checkpoints
@pytest.mark.slow
def test_patch_runs_as_shown(tmp_path, minilm, monkeypatch):
    """One command after the other, in one directory, and then the Python beside them."""
    shown = [c for c in commands() if c.split()[1] in ("patch", "verify", "run")]
    assert [c.split()[1] for c in shown] == ["patch", "verify", "run"]
    older = tmp_path / "older" / "transformers_modules" / "minilm_hyphen_mra"
    older.mkdir(parents=True)  # a cache of modules on PYTHONPATH, where Python looks first
    for package in (older, older.parent):
        (package / "__init__.py").touch()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "older"), prepend=os.pathsep)
        for command in shown:
            done = mra_cli(command.removeprefix("mra-cli "), tmp_path)
            assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_blocks()[1], names)
    assert names["model"].config._attn_implementation.startswith("mra_")


def test_nothing_else_is_shown_as_a_command():
    started = ("mra-cli ", "make ", ".ci/versions ")
    assert all(command.startswith(started) for command in commands())


def python_blocks() -> list[str]:
    """The Python of 'Commands', and of 'Patch'."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    return blocks


@pytest.mark.checkpoints
def test_python_runs(minilm):
    exec(python_blocks()[0], {})


def figures(text: str) -> dict[str, list[tuple[float, float]]]:
    """Errors and masses of each site by number, at each budget: a busy machine's longer times leave
    names less room."""
    return {
        site: [(float(error), float(mass)) for error, mass in ERROR_AND_MASS.findall(cells)]
        for site, _, cells in SITE_ROW.findall(text)
    }


@pytest.mark.checkpoints
@pytest.mark.slow
def test_the_output_shown_is_what_the_command_prints(tmp_path, minilm):
    shown = OUTPUT.search(README.read_text())
    assert shown is not None
    printed = mra_cli("analyze demo:minilm", tmp_path).stdout
    expected, actual = figures(shown[0]), figures(printed)
    assert len(expected) == 6 and expected.keys() == actual.keys()
    for site, rows in expected.items():
        assert len(rows) == 3
        for (error, mass), (fresh_error, fresh_mass) in zip(rows, actual[site], strict=True):
            assert fresh_error == pytest.approx(error, abs=0.002)
            assert fresh_mass == pytest.approx(mass, abs=1)
    verdicts = r"Budget [\d.]+\. (Yes|No|With care)"
    assert re.findall(verdicts, shown[0]) == re.findall(verdicts, printed)


if __name__ == "__main__":
    fresh = mra_cli("analyze demo:minilm", ROOT)
    assert fresh.returncode == 0, fresh.stderr
    trimmed = "\n".join(line.rstrip() for line in fresh.stdout.splitlines())
    text = OUTPUT.sub(lambda _: trimmed + "\n", README.read_text(), count=1)
    README.write_text(METHODS_TABLE.sub(lambda _: methods_table(), text, count=1))
