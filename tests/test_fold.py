"""`fold`: identities against plain formulas on every architecture, and what is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from architectures import ARCHITECTURES, comparable
from mra_cli.checkpoint import Checkpoint, load_checkpoint
from mra_cli.errors import InputError
from mra_cli.fold.fold import MIXING_FILE, REPORT_FILE, fold, start_variant
from mra_cli.fold.identities import Weights, apply_biases, figures
from mra_cli.fold.projections import Watcher
from mra_cli.fold.variants import reason_against
from mra_cli.inputs import Samples
from mra_cli.sites import find_sites, output_tensors

BY_NAME = {entry.name: entry for entry in ARCHITECTURES}


IN_FLOAT32 = {"qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3", "qwen3-next", "jamba", "gemma2"}
"""Mixtures of experts, for which torch has no float64, and one whose masks overflow in it; none
of them folds anything."""


def shaken(name: str):
    """A tiny model whose biases are not zero, in float64, and its inputs."""
    entry = BY_NAME[name]
    model, generator = entry.build(), torch.Generator().manual_seed(0)
    if name in IN_FLOAT32:
        return model, entry.inputs()
    model = model.double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    inputs = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in entry.inputs().items()
    }
    return model, inputs


def watch(model, inputs):
    sites = {site.name: site for site in find_sites(model, inputs)}
    return Watcher(model, sites).run(inputs)


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("bert", {"key bias", "value bias"}),
        ("gpt2", {"key bias", "value bias"}),  # one fused Conv1D
        ("vit", {"key bias", "value bias"}),
        ("whisper", {"value bias"}),  # its keys have no bias, its queries come scaled
        ("bart", {"key bias", "value bias"}),
        ("qwen2", set()),  # rotary positions; the output projection has no bias
        ("llama-gqa", set()),
        ("t5", set()),
    ],
)
def test_folded_biases_change_nothing(name, folds):
    model, inputs = shaken(name)
    before = comparable(BY_NAME[name], model(**inputs), inputs)
    found = watch(model, inputs)
    report = [figure for projections, watched in found for figure in figures(projections, watched)]
    assert {figure.identity for figure in report if figure.reason is None} == folds
    assert all(figure.gap < 1e-12 for figure in report if figure.gap is not None)
    for projections, _ in found:
        apply_biases(projections)
        for part in ("key", "value"):
            if f"{part} bias" in folds and getattr(projections, part).bias is not None:
                assert not getattr(projections, part).bias.any()
    after = comparable(BY_NAME[name], model(**inputs), inputs)
    for a, b in zip(after, before, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()


def test_a_wrong_fold_would_be_seen():
    model, inputs = shaken("bert")
    before = output_tensors(model(**inputs))[0]
    projections, _ = watch(model, inputs)[0]
    projections.value.write(None, torch.zeros_like(projections.value.bias))
    assert (output_tensors(model(**inputs))[0] - before).norm() > 1e-3 * before.norm()


def test_projections_are_the_layers_of_the_model():
    model, inputs = shaken("bert")
    (projections, watched), *_ = watch(model, inputs)
    names = [getattr(projections, part).name for part in ("query", "key", "value", "output")]
    assert [name.rpartition("layer.0.")[2] for name in names] == [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ]
    model, inputs = shaken("gpt2")
    (projections, watched), *_ = watch(model, inputs)
    width = model.config.n_embd
    assert projections.query.layer is projections.value.layer
    assert projections.value.channels.tolist() == list(range(2 * width, 3 * width))
    weights = Weights.of(projections)
    head = watched.value_input @ weights.value[1] + weights.value_bias[1]
    assert torch.allclose(head, watched.call.value[:, 1], atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_products_against_the_formula(name):
    """Softmax scores times inputs times W_V W_O, summed over heads; and what they cost."""
    model, inputs = shaken(name)
    projections, watched = watch(model, inputs)[0]
    product = {f.identity: f for f in figures(projections, watched)}["value x output"]
    site, weights = projections.site, Weights.of(projections)
    d = watched.value_input.shape[2]
    assert product.before.parameters == d * (site.kv_heads + site.heads) * site.value_dim
    assert product.after.parameters == site.heads * d * d
    assert product.after.cached == d
    assert product.reason.startswith("grows these parameters")
    assert product.gap < 1e-12
    if name == "llama-gqa":
        assert {f.identity: f for f in figures(projections, watched)}["query x key"].gap is None
        return
    q, k = watched.call.query, watched.call.key
    scores = watched.call.scaling * q @ k.transpose(2, 3)
    allowed = watched.call.mask.rows(0, q.shape[2])[:, None]
    attention = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    product = weights.value @ weights.output
    direct = torch.einsum("bhnm,bmi,hio->bno", attention, watched.value_input, product)
    bias = torch.einsum("hd,hdo->o", weights.value_bias, weights.output) + weights.output_bias
    real = watched.call.valid_rows
    assert torch.allclose((direct + bias)[real], watched.output[real], atol=1e-10)


def test_a_single_head_s_product_shrinks_but_has_no_place():
    entry = BY_NAME["bert"]
    config = dataclasses.replace(entry).build().config
    config.num_attention_heads = 1
    model = transformers.BertModel(config).eval()
    projections, watched = watch(model, entry.inputs())[0]
    product = {f.identity: f for f in figures(projections, watched)}["value x output"]
    assert product.after.parameters * 2 == product.before.parameters
    assert "shrinks" in product.reason and "class keeps" in product.reason


@pytest.mark.parametrize("entry", [e for e in ARCHITECTURES if e.interface], ids=lambda e: e.name)
def test_no_architecture_is_harmed(entry):
    """What is folded leaves the output as it was; a folded bias is zero."""
    model, inputs = shaken(entry.name)
    before = comparable(entry, model(**inputs), inputs)
    for projections, watched in watch(model, inputs):
        assert all(f.gap is None or f.gap < 1e-10 for f in figures(projections, watched))
        apply_biases(projections)
    for a, b in zip(comparable(entry, model(**inputs), inputs), before, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


# --- variants --------------------------------------------------------------------------------


def tiny_samples(name: str, count: int = 3) -> Samples:
    entry = BY_NAME[name]
    batch = entry.inputs()
    full = {key: value[:1] for key, value in batch.items() if torch.is_tensor(value)}
    generator = torch.Generator().manual_seed(0)
    batches = [
        {**full, "input_ids": torch.randint(10, 90, full["input_ids"].shape, generator=generator)}
        for _ in range(count)
    ]
    return Samples(batches, "numbers", "none", batches[0]["input_ids"].shape[1])


@pytest.mark.parametrize("kind", ["optimised", "efficient", "super"])
def test_a_variant_is_what_its_name_says(kind, tmp_path):
    checkpoint = Checkpoint("bert", BY_NAME["bert"].build(), None, None, "none")
    target = tmp_path / "out"
    report = start_variant(checkpoint, tiny_samples("bert"), kind=kind, target=target)
    assert report.variant == kind and report.damage.recovery < 0.9999
    assert json.loads((target / REPORT_FILE).read_text())["variant"] == kind
    assert (target / MIXING_FILE).exists() == (kind == "super")
    loaded = transformers.BertModel.from_pretrained(target)
    attention = loaded.encoder.layer[0].attention.self
    eye = torch.eye(loaded.config.hidden_size)
    assert torch.equal(attention.value.weight, eye) and not attention.value.bias.any()
    assert torch.equal(attention.key.weight, eye) == (kind != "optimised")
    width, length = loaded.config.hidden_size, 72
    share = {"optimised": 3, "efficient": 2, "super": 2}[kind] * width * width
    share += length * length if kind == "super" else 0
    assert all(site.parameters_after == share for site in report.variant_sites)
    if kind == "super":
        mixing = load_file(target / MIXING_FILE)
        assert {tuple(m.shape) for m in mixing.values()} == {(length, length)}


def test_a_variant_that_fits_is_found_again():
    """A site whose values are slices of its input already: the fit gives its own output back."""
    checkpoint = Checkpoint("bert", BY_NAME["bert"].build(), None, None, "none")
    for layer in checkpoint.model.encoder.layer:
        with torch.no_grad():
            layer.attention.self.value.weight.copy_(torch.eye(checkpoint.model.config.hidden_size))
            layer.attention.self.value.bias.zero_()
    report = start_variant(checkpoint, tiny_samples("bert", 12), kind="optimised")
    assert all(site.gap < 0.05 for site in report.variant_sites)
    assert report.damage.recovery > 0.99


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [("llama-gqa", "efficient", "share 2 key heads"), ("bart", "optimised", "cross-attention")],
)
def test_sites_that_can_t_be_a_variant(name, kind, says):
    model, inputs = shaken(name)
    reasons = [reason_against(kind, found) for found, _ in watch(model, inputs)]
    assert any(reason is not None and says in reason for reason in reasons), reasons
    checkpoint = Checkpoint(name, BY_NAME[name].build(), None, None, "none")
    if name == "llama-gqa":
        with pytest.raises(InputError, match="choose others by --layers"):
            start_variant(checkpoint, tiny_samples(name), kind=kind)


# --- the command -----------------------------------------------------------------------------


def test_a_folded_checkpoint_just_loads(cli, copy, text, tmp_path):
    bert, target = copy("bert"), tmp_path / "folded"
    model, _ = shaken("bert")
    model.float().save_pretrained(bert)
    ran = cli("fold", bert, "--text", text, "--out", target, "--seq-len", "96")
    assert ran.code == 0, ran
    assert "folds" in ran.out and "bias parameters are zero now" in ran.out
    source, folded = load_checkpoint(str(bert)), load_checkpoint(str(target))
    assert type(folded.model) is type(source.model)
    ids = torch.arange(10, 80)[None]
    a, b = (c.model(input_ids=ids).last_hidden_state for c in (source, folded))
    assert (a - b).norm() < 1e-5 * b.norm()
    assert json.loads((target / REPORT_FILE).read_text())["parity"] < 1e-5


@pytest.mark.checkpoints
def test_minilm(minilm, tmp_path):
    fresh = load_checkpoint("demo:minilm")
    from mra_cli.inputs import make_samples

    report = fold(fresh, make_samples(fresh, seq_len=128, count=2), target=tmp_path / "out")
    assert sum(f.before.parameters for f in report.folded) == 6 * 2 * 384
    assert report.parity < 1e-5 and report.damage.cosine_min > 0.999999
    assert all(f.gap < 1e-12 for f in report.identities)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--as", "best"), 2, ["--as", "expected optimised, efficient or super", "'best'"]),
        (("--as", "super", "--samples", "1"), 1, ["all samples but the last", "--samples 8"]),
        (("--layers", "9"), 1, ["--layers must name patchable sites"]),
    ],
)
def test_refused(refuses, bert, text, arguments, code, says):
    refuses("fold", bert, "--text", text, "--seq-len", "96", *arguments, code=code, says=says)


def test_nothing_to_fold(refuses, saved, text, tmp_path):
    says = ["nothing of .* can be folded", "leaving out --out"]
    target = tmp_path / "new"
    refuses(
        "fold", saved("llama-gqa"), "--text", text, "--seq-len", "96", "--out", target, says=says
    )
    assert not target.exists()


def test_never_over_something_else(refuses, bert, text, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    refuses("fold", bert, "--text", text, "--out", tmp_path / "there", says=["never replaced"])
