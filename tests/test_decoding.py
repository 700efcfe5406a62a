"""Decoding with block means beside the cache: the same as without, however the cache is used."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from mra_cli.caches import CachedBlocks
from mra_cli.methods import make_method, mra
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.sites import find_sites
from mra_kernels import KeyPyramid, implementations

pytestmark = pytest.mark.skipif(
    implementations()["native"] is not None, reason=str(implementations()["native"])
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def short_caches_count(monkeypatch):
    monkeypatch.setattr(mra, "_LONG_CACHE", 8)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def plan_of(model, budget=0.3, name="mra3"):
    return Plan.uniform(
        find_sites(model, {"input_ids": torch.ones(1, 256, dtype=torch.long)}),
        make_method(name, budget),
    )


@pytest.fixture
def extensions(monkeypatch):
    """How many tokens each call of `KeyPyramid.extend` took in."""
    taken, extend = [], KeyPyramid.extend

    def counted(self, key, value, valid=None):
        taken.append(key.shape[2] - self.length)
        extend(self, key, value, valid)

    monkeypatch.setattr(KeyPyramid, "extend", counted)
    return taken


def prompts(length=200, batch=2, padding=0):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 96, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def stepwise(model, cache, inputs, steps=6, before_step=lambda step, cache: None):
    """Logits of a prompt and of some tokens after it, fed one by one (and once five at once)."""
    logits = [model(**inputs, past_key_values=cache).logits[:, -1]]
    mask = inputs["attention_mask"]
    for step in range(steps):
        before_step(step, cache)
        new = torch.full((mask.shape[0], 5 if step == 2 else 1), 7 + step)
        mask = torch.cat([mask[:, : _length(cache)], torch.ones_like(new)], 1)
        out = model(input_ids=new, attention_mask=mask, past_key_values=cache)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


def _length(cache):
    return int(cache.get_seq_length())


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=300),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padding", [0, 70])
def test_kept_means_change_nothing(llama, kind, padding, extensions, monkeypatch):
    inputs = prompts(padding=padding)
    with patched(llama, plan_of(llama)):
        kept = stepwise(llama, CACHES[kind](llama), inputs)
        assert extensions == [201, 201, 1, 1, 5, 5, 1, 1, 1, 1, 1, 1], "two layers, once each"
        monkeypatch.setattr(CachedBlocks, "holds", lambda *_: False)
        extensions.clear()
        fresh = stepwise(llama, CACHES[kind](llama), inputs)
        assert min(extensions) > 200
    exact = stepwise(llama, CACHES[kind](llama), inputs)
    torch.testing.assert_close(kept, fresh, rtol=1e-6, atol=1e-6)
    assert (kept - exact).abs().max() > 1e-4, "it approximates"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["mra3", "mra2", "mra2s"])
def test_the_whole_budget_is_exact(llama, kind, name):
    inputs = prompts(padding=33)
    exact = stepwise(llama, CACHES[kind](llama), inputs)
    with patched(llama, plan_of(llama, 1.0, name)):
        whole = stepwise(llama, CACHES[kind](llama), inputs)
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-5)


MEDDLING = {
    "crop": lambda cache: cache.crop(-20),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "write": lambda cache: cache.layers[1].keys[:, :, 50].fill_(0.5),
}


@pytest.mark.parametrize("how", MEDDLING)
def test_a_cache_that_did_not_only_grow_starts_anew(llama, how, extensions, monkeypatch):
    def meddle(step, cache):
        if step == 3:
            MEDDLING[how](cache)

    inputs = prompts()
    with patched(llama, plan_of(llama)):
        kept = stepwise(llama, CACHES["dynamic"](llama), inputs, before_step=meddle)
        anew = sum(taken > 150 for taken in extensions)
        assert anew == (3 if how == "write" else 4), "the layers touched, and only they"
        monkeypatch.setattr(CachedBlocks, "holds", lambda *_: False)
        fresh = stepwise(llama, CACHES["dynamic"](llama), inputs, before_step=meddle)
    torch.testing.assert_close(kept, fresh, rtol=1e-6, atol=1e-6)


def test_a_mask_that_changes_starts_anew(llama, extensions):
    inputs, cache = prompts(), CACHES["dynamic"](llama)
    with torch.no_grad(), patched(llama, plan_of(llama)):
        llama(**inputs, past_key_values=cache)
        mask = torch.ones(2, 202)
        for length in (201, 202):
            if length == 202:
                mask[:, :40] = 0
            new = torch.full((2, 1), 5)
            llama(input_ids=new, attention_mask=mask[:, :length], past_key_values=cache)
    assert extensions == [201, 201, 202, 202]


def test_sliding_windows_are_read_in_full(extensions):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=100)).eval()
    inputs = prompts()
    exact = stepwise(model, DynamicCache(config=model.config), inputs)
    with patched(model, plan_of(model, 1.0)):
        whole = stepwise(model, DynamicCache(config=model.config), inputs)
    torch.testing.assert_close(whole, exact, rtol=1e-5, atol=1e-5)
    assert not extensions


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True},
    ],
    ids=str,
)
def test_generate(llama, how):
    """With the whole budget the same tokens as the exact model, whatever the strategy."""
    inputs = prompts(padding=40)
    outputs = []
    for budget in (None, 1.0):
        torch.manual_seed(0)
        call = {**inputs, "max_new_tokens": 5, "disable_compile": True, **how}
        if budget is None:
            outputs.append(llama.generate(**call))
            continue
        with patched(llama, plan_of(llama, budget)):
            outputs.append(llama.generate(**call))
    assert torch.equal(*outputs)


def test_a_patch_leaves_no_hooks_behind(llama):
    with patched(llama, plan_of(llama)):
        assert any(module._forward_pre_hooks for module in llama.modules())
        stepwise(llama, CACHES["dynamic"](llama), prompts(), steps=1)
    for module in llama.modules():
        assert not module._forward_pre_hooks
        assert not [name for name in vars(module) if name.startswith("_mra")]
