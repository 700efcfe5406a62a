"""The examples run, and show what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from cli_support import python

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments, cwd: Path) -> str:
    call = python(EXAMPLES / f"{name}.py", *arguments, HF_HOME=str(cwd / "cache"))
    done = subprocess.run(**call, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in tested for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_recipe_study(saved, tmp_path):
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    out = run(
        "recipe_study",
        *(saved("llama-gqa"), "--text", "words.txt", "--seq-len", "128"),
        *("--rules", "mra", "true mass (oracle)", "4 queries, 4 pooled keys", "tail of key blocks"),
        cwd=tmp_path,
    )
    assert len(re.findall(r"\| KL 0\.\d+, [+-]\d+\.\d+ % \|", out)) == 4


@pytest.mark.slow
def test_patch_and_generate(saved, tmp_path):
    out = run("patch_and_generate", saved("llama-gqa"), "patched", cwd=tmp_path)
    assert "attention: mra_" in out and "goes on:" in out


@pytest.mark.slow
@pytest.mark.checkpoints
def test_sentence_embeddings(minilm, tmp_path):
    pytest.importorskip("sentence_transformers", reason="pip install '.[examples]'")
    out = run("sentence_embeddings", "demo:minilm", "patched", cwd=tmp_path)
    cosines = [float(x) for x in re.findall(r"cosine ([\d.]+) to", out)]
    assert len(cosines) == 4 and all(0.9 < x < 1 for x in cosines)


@pytest.mark.slow
def test_evaluate_with_lm_eval(cli, saved, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install '.[examples]'")
    source = tmp_path / "source"
    shutil.copytree(saved("llama-gqa"), source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = tokenizer.sep_token  # the harness wants one
    tokenizer.save_pretrained(source)
    assert cli("patch", source, "--out", tmp_path / "x", "--no-measure").code == 0
    out = run("evaluate_with_lm_eval", tmp_path / "x", "6", cwd=tmp_path)
    assert re.search(r"exact: accuracy [\d.]+ of 6\npatched: accuracy [\d.]+ of 6", out)
