"""Blocks of queries that open single keys: choice and sums against independent formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_kernels import (
    AttentionMask,
    MraKeysConfig,
    exact_attention,
    implementations,
    mra_attention,
)
from mra_kernels.features import Directions
from mra_kernels.testing import make_qkv
from operator_cases import cases

needs_native = pytest.mark.skipif(
    implementations()["native"] is not None, reason=str(implementations()["native"])
)


@st.composite
def key_cases(draw):
    """`cases` with settings of this operator."""
    *tokens, mask, _, extras = draw(cases())
    config = MraKeysConfig(
        rows=draw(st.sampled_from([1, 4, 7, 16, 20])),
        budget=draw(st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0])),
        rank=draw(st.sampled_from([1, 3, 16])),
        tail=draw(st.sampled_from(["tilted", "pooled"])),
        first_keys=draw(st.integers(0, 5)),
    )
    return tokens, mask, config, extras


def by_definition(tokens, mask, config, extras, opened):
    """Every row on its own: exact logits of opened keys, and the tail's log-sum-exp at the mean
    query, whose gradient comes from autograd."""
    query, key, value = tokens
    batch, heads, n, _ = query.shape
    per_kv = heads // key.shape[1]
    visible = mask.rows(0, n).expand(batch, -1, -1)
    counted, _ = mask.pooled_tokens(config.rows)
    counted = torch.ones(batch, n, dtype=torch.bool) if counted is None else counted
    scale, cap = extras.get("scaling") or query.shape[3] ** -0.5, extras.get("softcap")
    bias, sinks = extras.get("bias"), extras.get("sinks")
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)

    def logits(vector, keys, added):
        scores = keys @ vector * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        return scores + added

    for b in range(batch):
        valid = visible.new_ones(mask.n_keys) if mask.key_valid is None else None
        valid = mask.key_valid[b % len(mask.key_valid)] if valid is None else valid
        for h in range(heads):
            k, v = key[b, h // per_kv], value[b, h // per_kv]
            added = torch.zeros(n, mask.n_keys) if bias is None else bias[b % len(bias), h]
            for i in range(n):
                tile = i // config.rows
                rows = range(tile * config.rows, min((tile + 1) * config.rows, n))
                live = [r for r in rows if visible[b, r].any()]
                sees = visible[b, i]
                if not sees.any():
                    mean = v[valid].sum(0) / valid.sum().clamp(min=1)
                    output[b, h, i] = 0 if sinks is not None else mean
                    continue
                whole = torch.stack([visible[b, r] for r in live]).all(0)
                near = opened[b, h, tile] & sees
                far = whole & ~opened[b, h, tile]
                assert (near | far).eq(sees).all(), "every visible key, once"
                speak = [r for r in rows if counted[b % len(counted), r]]
                mean = query[b, h, speak].mean(0).requires_grad_()
                of_block = added[speak].mean(0)
                parts = [logits(query[b, h, i], k[near], added[i, near])]
                values = [v[near]]
                if far.any():
                    tail = logits(mean, k[far], of_block[far])
                    lse = tail.logsumexp(0)
                    height = lse.detach()
                    if config.tail == "tilted" and not cap:
                        (slope,) = torch.autograd.grad(lse, mean, retain_graph=True)
                        height = height + (query[b, h, i] - mean.detach()) @ slope
                    parts.append(height[None])
                    values.append((tail.softmax(0) @ v[far]).detach()[None])
                if sinks is not None:
                    parts.append(sinks[h : h + 1])
                    values.append(torch.zeros(1, v.shape[1], dtype=torch.float64))
                output[b, h, i] = torch.cat(parts).softmax(0) @ torch.cat(values)
    return output


@settings(max_examples=60, deadline=None)
@given(key_cases())
def test_outputs_follow_the_definition(case):
    tokens, mask, config, extras = case
    result = mra_attention(*tokens, config=config, mask=mask, impl="reference", **extras)
    expected = by_definition(tokens, mask, config, extras, result.selection.opened())
    torch.testing.assert_close(result.output, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(key_cases())
def test_the_plan_keeps_its_budget_and_tiles_what_is_visible(case):
    tokens, mask, config, extras = case
    plan = mra_attention(*tokens, config=config, mask=mask, impl="reference", **extras).selection
    visible = mask.rows(0, mask.n_queries).expand(len(tokens[0]), -1, -1)
    padding = mask.padding_rows(config.rows, len(visible))
    per_row = plan.opened().repeat_interleave(config.rows, 2)[:, :, : mask.n_queries]
    real = ~padding.repeat_interleave(config.rows, 1)[:, : mask.n_queries]
    entries = (per_row & (visible & real[..., None])[:, None]).sum((2, 3))
    legal = (visible & real[..., None]).sum((1, 2)).clamp(min=1)[:, None]
    torch.testing.assert_close(plan.density, entries / legal)
    assert (plan.density <= torch.clamp(plan.forced, min=config.budget) + 1e-6).all()
    exact, left, estimated = plan.counts
    assert exact == int((per_row & visible[:, None]).sum())
    assert estimated == tokens[0].shape[1] * int(visible.sum()) and left >= 0


@needs_native
@settings(max_examples=150, deadline=None)
@given(key_cases())
def test_native_computes_the_same_plan_to_the_same_numbers(case):
    tokens, mask, config, extras = case
    if mask.dense is not None:
        return
    single = [x.float() for x in tokens]
    floats = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in extras.items()}
    result = mra_attention(*single, config=config, mask=mask, impl="native", **floats)
    expected = mra_attention(
        *(x.double() for x in single),
        config=config,
        mask=mask,
        impl="reference",
        selection=result.selection,
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in floats.items()},
    )
    torch.testing.assert_close(result.output.double(), expected.output, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=3e-5, atol=3e-5)


@needs_native
@pytest.mark.parametrize("seed", range(25))
def test_native_makes_the_same_plan(seed):
    """Estimates are summed in another order, so that one key in a thousand may change places."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    n = draw(100, 231, 300)
    query, key, value = make_qkv(
        seed, 2, 4, draw(1, 2, 4), n, n, draw(8, 40), 5, dtype=torch.float32
    )
    mask = draw(
        AttentionMask.full(n, n), AttentionMask.causal(n), AttentionMask.causal(n, window=60)
    )
    if draw(True, False):
        valid = torch.ones(2, n, dtype=torch.bool)
        valid[0, :70] = valid[1, n - 20 :] = False
        mask = mask.with_padding(valid, valid)
    config = MraKeysConfig(
        rows=draw(5, 16, 32), budget=draw(0.1, 0.4), rank=draw(4, 16), first_keys=draw(0, 9)
    )
    bias = draw(None, torch.randn(1, 1, n, n, generator=generator))
    arguments = {"config": config, "mask": mask, "bias": bias}
    ours = mra_attention(query, key, value, impl="native", **arguments).selection
    theirs = mra_attention(query, key, value, impl="reference", **arguments).selection
    assert (ours.opened() != theirs.opened()).double().mean() < 1e-3
    torch.testing.assert_close(ours.density, theirs.density, rtol=0, atol=1e-3)
    assert torch.equal(ours.forced, theirs.forced)
    assert ours.counts[2] == theirs.counts[2]
    assert ours.counts[:2] == pytest.approx(theirs.counts[:2], rel=1e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_the_keys_chosen_are_the_nearest(causal):
    """At full rank: sorted by the largest probability that any row of the block gives them, up to
    what rounding to bytes does; of distant keys, one in 8 stands for all in log-sum-exps."""
    n, width = 224, 8
    query, key, value = make_qkv(7, 1, 2, 1, n, n, width)
    query = query / 2
    mask = AttentionMask.causal(n) if causal else AttentionMask.full(n, n)
    config = MraKeysConfig(rows=16, budget=0.3, rank=width, first_keys=0)
    opened = mra_attention(query, key, value, config=config, mask=mask).selection.opened()
    logits = (query @ key.mT * width**-0.5).masked_fill(~mask.rows(0, n), -torch.inf)
    counts = torch.zeros(n, n, dtype=torch.float64)
    for row in range(n):
        block = row // 16 * 16
        close = {token // 64 for token in range(block - 32, block + 16 + 32)} | {0}
        for j in range(n):
            counts[row, j] = 1 if j // 64 in close else 8 if j % 8 == 0 else 0
    lse = (logits + counts.log()).logsumexp(-1, keepdim=True)
    worth = (logits - lse).unflatten(2, (-1, 16)).amax(3)
    whole = mask.rows(0, n).unflatten(1, (-1, 16)).all(2)
    for head in range(2):
        chosen, rest = opened[0, head] & whole[0], ~opened[0, head] & whole[0]
        assert chosen.any() and rest.any()
        assert worth[0, head][chosen].min() > worth[0, head][rest].max() - 1 / 8 - 0.2


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_a_key_that_is_far_out_leaves_the_others_their_levels(impl):
    """Models park attention on a token unlike all others; the rest must still be told apart."""
    query, key, value = make_qkv(11, 1, 2, 2, 256, 256, 16, dtype=torch.float32)
    config = MraKeysConfig(budget=0.2, rank=16)
    query[..., 0], key[:, :, 0] = 1, 0
    still = mra_attention(query, key, value, config=config, impl=impl).selection.opened()
    key[:, :, 0, 0] = -3000  # nobody looks at it
    moved = mra_attention(query, key, value, config=config, impl=impl).selection.opened()
    assert (moved != still)[..., 16:].double().mean() < 0.05


def test_features_are_the_best_of_their_rank():
    """Eckart & Young: what is left is the tail of the singular values."""
    query, key, _ = make_qkv(3, 1, 2, 2, 200, 150, 12)
    mask = AttentionMask.full(200, 150)
    centred = key - key.mean(2, keepdim=True)
    singular = torch.linalg.svdvals(query @ centred.mT)
    for rank in (1, 5, 11):
        of_queries, of_keys = Directions.leading(query, key, mask, rank).features(query, key)
        assert of_queries.shape[-1] == of_keys.shape[-1] == rank
        error = (query @ centred.mT - of_queries @ of_keys.mT).square().sum((-1, -2))
        best = singular[..., rank:].square().sum(-1)
        torch.testing.assert_close(error, best, rtol=1e-3, atol=0)
    of_queries, of_keys = Directions.leading(query, key, mask, 12).features(query, key)
    torch.testing.assert_close(of_queries @ of_keys.mT, query @ centred.mT)


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_a_budget_of_one_is_exact(impl):
    query, key, value = make_qkv(1, n=200, m=200, d=16, dtype=torch.float32)
    mask = AttentionMask.causal(200)
    result = mra_attention(
        query, key, value, config=MraKeysConfig(budget=1.0), mask=mask, impl=impl
    )
    expected = exact_attention(query, key, value, mask=mask, scaling=0.25)
    torch.testing.assert_close(result.output, expected, rtol=1e-5, atol=1e-5)
    assert (result.selection.density == 1).all()


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_each_head_has_its_budget(impl):
    query, key, value = make_qkv(1, 1, 3, 3, 256, 256, 16, dtype=torch.float32)
    config = MraKeysConfig(head_budgets=(0.1, 0.5, 1.0))
    density = mra_attention(query, key, value, config=config, impl=impl).selection.density
    torch.testing.assert_close(density, torch.tensor([[0.1, 0.5, 1.0]]), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="head_budgets must be 3 numbers, one a head, got 2"):
        config = MraKeysConfig(head_budgets=(0.1, 0.5))
        mra_attention(query, key, value, config=config, impl=impl)


@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_padding_does_not_reach_real_rows(impl):
    """A short sequence alone, and padded in a batch with a longer one."""
    query, key, value = make_qkv(5, 2, 2, 2, 160, 160, 16, dtype=torch.float32)
    config = MraKeysConfig(rows=16, budget=0.3)
    valid = torch.ones(2, 160, dtype=torch.bool)
    valid[1, 96:] = False
    mask = AttentionMask.full(160, 160).with_padding(valid, valid)
    together = mra_attention(query, key, value, config=config, mask=mask, impl=impl).output
    alone = mra_attention(
        *(x[1:, :, :96] for x in (query, key, value)), config=config, impl=impl
    ).output
    torch.testing.assert_close(together[1:, :, :96], alone, rtol=1e-4, atol=1e-4)


def test_gradients():
    query, key, value = make_qkv(2, 1, 2, 1, 20, 20, 4)
    mask, config = AttentionMask.causal(20), MraKeysConfig(rows=4, budget=0.4)
    sinks = torch.randn(2, dtype=torch.float64)
    plan = mra_attention(query, key, value, config=config, mask=mask, sinks=sinks).selection
    inputs = [x.requires_grad_() for x in (query, key, value, sinks)]

    def run(q, k, v, s):
        return mra_attention(q, k, v, config=config, mask=mask, sinks=s, selection=plan).output

    assert plan.density.max() < 0.6, "there is a tail"
    assert torch.autograd.gradcheck(run, inputs)


def test_the_tilt_helps():
    """Queries spread around their mean: to first order is nearer than at the mean."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 1, 512, 16, dtype=torch.float64)
    middles = torch.randn(1, 1, 32, 1, 16, dtype=torch.float64)
    query = (middles + torch.randn(1, 1, 32, 16, 16)).flatten(2, 3)
    exact = exact_attention(query, key, value, scaling=0.25)

    def error(tail):
        config = MraKeysConfig(budget=0.05, tail=tail)
        output = mra_attention(query, key, value, config=config).output
        return float((output - exact).norm() / exact.norm())

    assert error("tilted") < 0.95 * error("pooled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"first_keys": -1}, "first_keys must be at least 0, got -1"),
        ({"tail": "none"}, "tail must be one of tilted, pooled; got 'none'"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\], got 0.0"),
        ({"head_budgets": (0.5, 2.0)}, r"budget must be in \(0, 1\], got 2.0"),
        ({"grid": (0, 3)}, r"grid must be \(height, width\) in tokens"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        MraKeysConfig(**change)


def test_log_sums_are_of_the_exact_part():
    query, key, value = make_qkv(1, 1, 1, 1, 64, 64, 8)
    result = mra_attention(query, key, value, config=MraKeysConfig(budget=0.5, rank=8))
    opened = result.selection.opened().repeat_interleave(16, 2)
    logits = (query @ key.mT / math.sqrt(8)).masked_fill(~opened, -torch.inf)
    torch.testing.assert_close(result.lse, logits.logsumexp(-1))
