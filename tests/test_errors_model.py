"""Refused: models that load, and hold nothing that can be measured."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cli_support import save_tokenizer


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


def test_a_model_of_pictures_and_text_gets_a_made_up_picture(cli, saved):
    ran = cli("check", saved("clip"))
    assert ran.code == 0 and "4 of 4 sites can be approximated" in ran.out, ran


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
