"""MRA attention against dense float64 formulas, over everything it says it honours."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mra_kernels import (
    PRESETS,
    AttentionMask,
    MraAttentionConfig,
    ScoreRule,
    exact_attention,
    mra_attention,
)
from mra_kernels.testing import dense_logits, dense_mra, dense_softmax, make_qkv
from operator_cases import cases


@settings(max_examples=150, deadline=None)
@given(cases())
def test_against_the_dense_formula(case):
    query, key, value, mask, config, extras = case
    result = mra_attention(query, key, value, config=config, mask=mask, **extras)
    rule = ScoreRule(extras["scaling"], extras["softcap"], extras["bias"])
    expected, covered = dense_mra(
        query, key, value, mask, config, rule, result.selection, extras["sinks"]
    )
    visible = mask.rows(0, mask.n_queries)[:, None].expand_as(covered)
    rows = visible.any(-1)
    assert torch.isfinite(result.output).all()
    assert (result.output[rows].abs().sum(-1) > 0).all()
    torch.testing.assert_close(result.output[rows], expected[rows], rtol=1e-9, atol=1e-10)
    # Pairs tile the legal entries: once each with a coarse term, at most once without.
    assert (covered[visible] <= 1).all()
    if config.coarse != "none":
        assert (covered[visible] == 1).all()
    selection = result.selection
    assert (selection.density <= config.budget + selection.forced + 1e-12).all()
    assert (selection.density <= 1).all()
    if config.budget == 1.0:
        logits, _ = dense_logits(query, key, mask, rule)
        exact = dense_softmax(logits, visible, value, extras["sinks"])
        torch.testing.assert_close(result.output[rows], exact[rows], rtol=1e-9, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_exact_attention_against_the_dense_formula(case):
    query, key, value, mask, _, extras = case
    rule = ScoreRule(extras["scaling"], extras["softcap"], extras["bias"])
    logits, visible = dense_logits(query, key, mask, rule)
    rows = visible.any(-1)
    output = exact_attention(query, key, value, mask=mask, **extras)
    expected = dense_softmax(logits, visible, value, extras["sinks"])
    torch.testing.assert_close(output[rows], expected[rows], rtol=1e-9, atol=1e-10)
    assert (output[~rows] == 0).all()


def test_two_levels_choose_the_best_blocks():
    """R = (32, 1) is the paper's MRA-2: the top blocks by row-normalised mean logit."""
    query, key, value = make_qkv(0, batch=1, heads=2, kv_heads=2, n=128, m=128)
    config = MraAttentionConfig(blocks_per_row=1)
    selection = mra_attention(query, key, value, config=config).selection
    logits = torch.einsum("bhnd,bhmd->bhnm", query, key) * 8**-0.5
    means = logits.unflatten(2, (4, 32)).unflatten(4, (4, 32)).mean((3, 5))
    score = (means - means.amax(-1, keepdim=True)).flatten(2)
    expected = score.topk(4, dim=-1).indices.sort(-1).values.flatten()
    fine = selection.fine
    assert torch.equal(fine.row * 4 + fine.col, expected)
    assert selection.density.tolist() == [[0.25, 0.25]]


def test_the_published_score_and_the_code_s_score_differ():
    query, key, value = make_qkv(3, batch=1, n=256, m=256)
    chosen = [
        mra_attention(query, key, value, config=MraAttentionConfig(score=score)).selection.fine
        for score in ("row", "mu")
    ]
    assert len(chosen[0]) == len(chosen[1])
    assert not torch.equal(chosen[0].row * 8 + chosen[0].col, chosen[1].row * 8 + chosen[1].col)


def test_budget_zero_blocks_is_attention_between_pooled_tokens():
    query, key, value = make_qkv(1, batch=1, heads=1, kv_heads=1, n=64, m=64)
    output = mra_attention(query, key, value, config=MraAttentionConfig(budget=1e-6)).output
    pooled = [x.unflatten(2, (2, 32)).mean(3) for x in (query, key, value)]
    expected = exact_attention(*pooled).repeat_interleave(32, dim=2)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", PRESETS)
def test_constant_values_come_out_unchanged(name):
    query, key, _ = make_qkv(2)
    value = torch.full((2, 2, 50, 3), 1.25, dtype=torch.float64)
    for mask in (AttentionMask.full(50, 50), AttentionMask.causal(50)):
        output = mra_attention(query, key, value, config=PRESETS[name], mask=mask).output
        torch.testing.assert_close(output, torch.full_like(output, 1.25))


@pytest.mark.parametrize("name", PRESETS)
def test_batch_items_and_heads_do_not_touch_each_other(name):
    query, key, value = make_qkv(4, heads=4, kv_heads=4)
    config = PRESETS[name]
    whole = mra_attention(query, key, value, config=config).output
    for b in range(2):
        for h in range(4):
            part = (x[b : b + 1, h : h + 1] for x in (query, key, value))
            alone = mra_attention(*part, config=config).output
            torch.testing.assert_close(alone[0, 0], whole[b, h], rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_for_real_rows():
    """A padded sample gives what the same sample gives alone, when its blocks line up."""
    query, key, value = make_qkv(5, batch=1, n=64, m=64)
    config = MraAttentionConfig(resolutions=(8, 1), budget=0.3, first_blocks=1)
    alone = mra_attention(query, key, value, config=config)
    noise = make_qkv(6, batch=1, n=24, m=24)
    for left in (False, True):
        padded = [
            torch.cat([b, a] if left else [a, b], dim=2)
            for a, b in zip((query, key, value), noise, strict=True)
        ]
        valid = torch.ones(1, 88, dtype=torch.bool)
        valid[:, slice(0, 24) if left else slice(64, 88)] = False
        mask = AttentionMask.full(88, 88).with_padding(valid, valid)
        result = mra_attention(*padded, config=config, mask=mask)
        torch.testing.assert_close(result.output[:, :, valid[0]], alone.output)
        torch.testing.assert_close(result.selection.density, alone.selection.density)


def test_coarse_blocks_of_a_causal_mask_lie_strictly_in_the_past():
    query, key, value = make_qkv(7, n=100, m=100)
    config = MraAttentionConfig(resolutions=(16, 4, 1), budget=0.05, coarse="per_query")
    base = mra_attention(query, key, value, config=config, mask=AttentionMask.causal(100))
    for level in base.selection.coarse:
        assert (level.col < level.row).all()
    # So later keys and values can't reach earlier rows.
    key[:, :, 80:] += 3.0
    value[:, :, 80:] += 3.0
    later = mra_attention(query, key, value, config=config, mask=AttentionMask.causal(100))
    torch.testing.assert_close(later.output[:, :, :80], base.output[:, :, :80])


@pytest.mark.parametrize("resolutions", [(8, 1), (16, 4, 1)])
def test_priors_go_first_in_the_budget(resolutions):
    """The first blocks (behind left padding: the first real ones) and the diagonal, every level."""
    query, key, value = make_qkv(12, n=128, m=128)
    side, skipped = resolutions[-2], 48
    valid = torch.ones(2, 128, dtype=torch.bool)
    valid[1, :skipped] = False
    mask = AttentionMask.full(128, 128).with_padding(valid, valid)
    config = MraAttentionConfig(
        resolutions=resolutions, budget=0.5, first_blocks=1, diagonal_blocks=1
    )
    fine = mra_attention(query, key, value, config=config, mask=mask).selection.fine
    chosen = torch.zeros(2, 4, 128 // side, 128 // side, dtype=torch.bool)
    chosen[fine.head // 4, fine.head % 4, fine.row, fine.col] = True
    for batch, first in ((0, 0), (1, skipped // side)):
        real = chosen[batch, :, first:, first:]
        assert real[:, :, 0].all() and real[:, 0].all()
        assert real.diagonal(dim1=1, dim2=2).all()
        assert not real.all()
    without = dataclasses.replace(config, first_blocks=0, diagonal_blocks=0)
    fine = mra_attention(query, key, value, config=without, mask=mask).selection.fine
    assert (fine.col[fine.head < 4] == 0).sum() < 4 * 128 // side


def test_ties_go_to_the_lower_index():
    query = torch.zeros(1, 1, 128, 4)
    key, value = torch.zeros(1, 1, 128, 4), torch.randn(1, 1, 128, 4)
    fine = mra_attention(query, key, value, config=MraAttentionConfig()).selection.fine
    assert fine.row.tolist() == [0, 0, 0, 0]
    assert fine.col.tolist() == [0, 1, 2, 3]


def test_a_row_without_a_block_is_rescued_and_charged():
    """MRA-2-s with one block for four rows of blocks: the others get their best block."""
    query, key, value = make_qkv(8, batch=1, heads=1, kv_heads=1, n=128, m=128)
    config = MraAttentionConfig(coarse="none", score="mu", budget=1 / 16)
    result = mra_attention(query, key, value, config=config)
    assert result.selection.fine.row.unique().numel() == 4
    assert float(result.selection.density) == pytest.approx(4 / 16, abs=1 / 16)
    assert float(result.selection.forced) > 0
    assert torch.isfinite(result.lse).all()


def test_gradients_match_the_dense_formula():
    query, key, value = (x.requires_grad_() for x in make_qkv(9, batch=1, n=40, m=40))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    config = MraAttentionConfig(resolutions=(8, 2, 1), budget=0.2)
    mask = AttentionMask.causal(40)
    result = mra_attention(query, key, value, config=config, mask=mask, sinks=sinks)
    dense, _ = dense_mra(
        query, key, value, mask, config, ScoreRule(8**-0.5), result.selection, sinks
    )
    weights = torch.randn(result.output.shape, dtype=torch.float64)
    inputs = (query, key, value, sinks)
    ours = torch.autograd.grad((result.output * weights).sum(), inputs)
    theirs = torch.autograd.grad((dense * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    query, key, value = make_qkv(10, dtype=dtype)
    config = MraAttentionConfig(resolutions=(8, 1))
    output = mra_attention(query, key, value, config=config).output
    exact = mra_attention(query.float(), key.float(), value.float(), config=config).output
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype))


def test_values_of_another_width_keep_memory_linear():
    """DeepSeek's attention; torch's own kernel would build the N x N matrix."""
    peaks = []
    for n in (1024, 2048):
        query, key, value = (torch.randn(1, 2, n, width) for width in (48, 48, 32))
        with _LargestTensor() as largest:
            exact_attention(query, key, value, mask=AttentionMask.causal(n))
        peaks.append(largest.bytes)
    assert peaks[1] <= 2 * peaks[0] < 1024 * 1024 * 4


class _LargestTensor(TorchDispatchMode):
    """Size of the largest result of any operation."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutions": (32, 5, 1)}, "each dividing the one before"),
        ({"resolutions": (32,)}, "end in 1"),
        ({"budget": 0.0}, "budget must be in"),
        ({"budget": 1.5}, "budget must be in"),
        ({"blocks_per_row": 2, "resolutions": (16, 4, 1)}, "use budget instead"),
        ({"coarse": "some"}, "pooled, per_query, none"),
        ({"score": "best"}, "row, mu"),
        ({"first_blocks": -1}, "at least 0"),
        ({"grid": (4, 0)}, "height, width"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MraAttentionConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 3)}, r"query must be a float tensor .* got"),
        ({"key": torch.zeros(1, 3, 5, 4)}, "a divisor of 2"),
        ({"value": torch.zeros(1, 2, 6, 4)}, "to fit key"),
        ({"value": torch.zeros(1, 2, 5, 4).half()}, "dtype torch.float32"),
        ({"mask": AttentionMask.full(5, 4)}, "5 queries x 5 keys, got 5 x 4"),
        ({"sinks": torch.zeros(3)}, r"sinks must have shape \[2\]"),
        ({"bias": torch.zeros(1, 2, 5, 4)}, "bias must have shape"),
        ({"impl": "fast"}, "auto, native, triton, reference"),
        ({"config": MraAttentionConfig(grid=(3, 3))}, "at least 9 tokens, got 5"),
    ],
)
def test_bad_arguments_are_named(change, message):
    base = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 5, 4))
    arguments = {**base, "config": MraAttentionConfig(), **change}
    with pytest.raises(ValueError, match=message):
        mra_attention(**arguments)
