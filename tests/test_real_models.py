"""Identities that a user relies on, on real checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError, UnsupportedModelError
from mra_cli.evaluate import Judge
from mra_cli.inputs import make_samples, probe
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.report import read_plan
from mra_cli.sites import find_sites, output_tensors
from mra_kernels import PRESETS

pytestmark = pytest.mark.checkpoints

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 9,
    "Attention is a weighted mean of values. " * 6,
    "A multi-resolution analysis looks at the whole before it looks at the parts. " * 9,
]


def ragged(checkpoint: Checkpoint, side: str) -> dict[str, torch.Tensor]:
    """Three texts of different lengths, padded on one side."""
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.padding_side = side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3 and min(lengths) > 40
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def real_rows(output, batch) -> torch.Tensor:
    return output_tensors(output)[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize(
    ("model", "side"),
    [
        *(("minilm", "left"), ("minilm", "right")),
        *(pytest.param("smollm2", side, marks=pytest.mark.slow) for side in ("left", "right")),
    ],
)
@torch.no_grad()
def test_full_budget_is_exact_on_a_ragged_batch(model, side, request):
    checkpoint = request.getfixturevalue(model)
    batch = ragged(checkpoint, side)
    exact = real_rows(checkpoint.model(**batch), batch)
    sites = find_sites(checkpoint.model, batch)
    assert {site.verdict for site in sites} == {"patch"}
    for name in ("mra", "mra2s") if model == "minilm" else ("mra",):
        with patched(checkpoint.model, Plan.uniform(sites, make_method(name, 1.0))):
            full = real_rows(checkpoint.model(**batch), batch)
        assert (full - exact).norm() / exact.norm() <= 2e-6, name
    with patched(checkpoint.model, Plan.uniform(sites, make_method("mra", 0.25))):
        quarter = real_rows(checkpoint.model(**batch), batch)
    assert (quarter - exact).norm() / exact.norm() > 1e-3
    assert torch.equal(real_rows(checkpoint.model(**batch), batch), exact)


def test_full_budget_keeps_the_perplexity(smollm2):
    samples = make_samples(smollm2, seq_len=256, count=2)
    judge = Judge(smollm2.model, samples.batches, smollm2.tokenizer)
    sites = find_sites(smollm2.model, probe(samples))
    for name in ("mra", "mra3"):
        with patched(smollm2.model, Plan.uniform(sites, make_method(name, 1.0))):
            damage = judge.judge()
        assert damage.perplexity == pytest.approx(damage.perplexity_exact, rel=1e-4)
        assert damage.kl == pytest.approx(0.0, abs=1e-6)
        assert damage.top1_agreement > 0.99


def test_the_default_method_beats_the_published_ones_on_a_causal_model(smollm2):
    """What this tool is for: at the same density, far less damage than MRA-2 as published."""
    samples = make_samples(smollm2, seq_len=512, count=1)
    judge = Judge(smollm2.model, samples.batches, smollm2.tokenizer)
    sites = find_sites(smollm2.model, probe(samples))
    perplexity = {}
    for name in PRESETS:
        with patched(smollm2.model, Plan.uniform(sites, make_method(name, 0.25))):
            damage = judge.judge()
        perplexity[name] = damage.perplexity
    exact = damage.perplexity_exact
    assert exact < perplexity["mra"] < 1.02 * exact
    assert 1.5 * exact < min(perplexity["mra2"], perplexity["mra2s"])


def test_logits_a_few_rows_at_a_time_are_the_model_s_logits(smollm2):
    samples = make_samples(smollm2, seq_len=64, count=1)
    judge = Judge(smollm2.model, samples.batches, smollm2.tokenizer)
    assert judge._outputs._light
    with torch.no_grad():
        logits = smollm2.model(**samples.batches[0]).logits[0, :-1]
    labels = samples.batches[0]["input_ids"][0, 1:]
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert judge.judge().loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_left_padding(smollm2, cache):
    """Prefill runs patched, decoding exactly; at budget 1 every token is the exact model's."""
    batch = ragged(smollm2, "left")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    exact = smollm2.model.generate(**batch, **options)
    sites = find_sites(smollm2.model, batch)
    with patched(smollm2.model, Plan.uniform(sites, make_method("mra", 1.0))):
        assert torch.equal(smollm2.model.generate(**batch, **options), exact)
    with patched(smollm2.model, Plan.uniform(sites, make_method("mra", 0.5))):
        assert smollm2.model.generate(**batch, **options).shape == exact.shape


@torch.no_grad()
def test_contexts_nest_and_copies_keep_their_patch(minilm):
    batch = ragged(minilm, "right")
    sites = find_sites(minilm.model, batch)
    low, high = (Plan.uniform(sites, make_method("mra2", budget)) for budget in (0.1, 0.5))
    exact = real_rows(minilm.model(**batch), batch)
    with patched(minilm.model, low):
        outer = real_rows(minilm.model(**batch), batch)
        with patched(minilm.model, high):
            inner = real_rows(minilm.model(**batch), batch)
        assert torch.equal(real_rows(minilm.model(**batch), batch), outer)
        twin = copy.deepcopy(minilm.model)
        assert torch.equal(real_rows(twin(**batch), batch), outer)
    assert not torch.equal(outer, inner)
    assert torch.equal(real_rows(minilm.model(**batch), batch), exact)


def test_a_failing_forward_leaves_the_model_as_it_was(minilm):
    batch = ragged(minilm, "right")
    plan = Plan.uniform(find_sites(minilm.model, batch), make_method("mra2", 0.5))
    before = minilm.model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), patched(minilm.model, plan):
        raise RuntimeError("on purpose")
    assert minilm.model.config._attn_implementation == before
    assert not any("_mra_site" in vars(module) for module in minilm.model.modules())


def test_training_with_attention_dropout_is_refused(minilm):
    model = copy.deepcopy(minilm.model).train()
    batch = ragged(minilm, "right")
    plan = Plan.uniform(find_sites(minilm.model, batch), make_method("mra2", 0.5))
    with (
        pytest.raises(UnsupportedModelError, match=r"dropout must be 0 .* model\.eval"),
        patched(model, plan),
    ):
        model(**batch)


def test_plans_are_read_back_and_must_fit(minilm, tmp_path):
    batch = ragged(minilm, "right")
    plan = Plan.uniform(find_sites(minilm.model, batch), make_method("mra", 0.3))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert read_plan(path, None) == plan
    strange = Plan({"encoder.layer.99": plan.sites["encoder.layer.0.attention.self"]})
    with (
        pytest.raises(InputError, match=r"has no encoder\.layer\.99"),
        patched(minilm.model, strange),
    ):
        pass
