"""Blocks of more queries than keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mra_kernels import AttentionMask, MraAttentionConfig, ScoreRule, mra_attention
from mra_kernels.selection import Selection
from mra_kernels.testing import dense_logits, make_qkv

CONFIG = MraAttentionConfig((8, 1), 0.25, query_rows=32)
IMPLS = ["reference", "native"]


def opened(selection: Selection, rows: int, cols: int, heads: int = 4) -> torch.Tensor:
    """Which pairs are exact, bool ``[B, H, rows, cols]``."""
    fine = selection.fine
    grid = torch.zeros(fine.head.max() + 1, rows, cols, dtype=torch.bool)
    grid[fine.head, fine.row, fine.col] = True
    return grid.unflatten(0, (-1, heads))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_best_pairs_are_opened(impl, causal):
    """Against means over entries of the whole matrix of logits."""
    query, key, value = make_qkv(0, n=128, m=128, dtype=torch.float32)
    mask = AttentionMask.causal(128) if causal else AttentionMask.full(128, 128)
    selection = mra_attention(query, key, value, config=CONFIG, mask=mask, impl=impl).selection
    logits, visible = dense_logits(query, key, mask, ScoreRule(8**-0.5))
    blocks = logits.unflatten(2, (4, 32)).unflatten(4, (16, 8)).mean((3, 5))
    legal = visible.unflatten(2, (4, 32)).unflatten(4, (16, 8)).sum((3, 5))
    score = blocks.masked_fill(legal == 0, -torch.inf)
    score = score - score.amax(-1, keepdim=True)
    cut = (legal > 0) & (legal < 32 * 8)
    chosen = opened(selection, 4, 16)
    for b in range(2):
        for h in range(4):
            left = int(0.25 * legal[b, h].sum()) - int((legal * cut)[b, h].sum())
            expected = cut[b, h].clone().flatten()
            whole = (legal[b, h] == 32 * 8).flatten()
            order = score[b, h].flatten().masked_fill(~whole, -torch.inf).argsort(descending=True)
            paid = min(max(0, left) // (32 * 8), int(whole.sum()))
            expected[order[:paid]] = True
            assert torch.equal(chosen[b, h].flatten(), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0, 16])
def test_the_diagonal_goes_through_as_many_blocks_as_a_row_is_high(impl, offset):
    tokens = make_qkv(1, n=128, m=160, dtype=torch.float32)
    config = dataclasses.replace(CONFIG, diagonal_blocks=1)
    mask = dataclasses.replace(AttentionMask.full(128, 160), query_offset=offset)
    selection = mra_attention(*tokens, config=config, mask=mask, impl=impl).selection
    chosen = opened(selection, 4, 20)
    for row in range(4):
        first = (row * 32 + offset) // 8
        assert chosen[:, :, row, first : first + 4].all()
    assert chosen.sum() > 8 * 16  # the budget pays for others, too


@pytest.mark.parametrize("impl", IMPLS)
def test_as_many_queries_as_keys_is_the_square_block(impl):
    tokens = make_qkv(2, n=100, m=100, dtype=torch.float32)
    square = MraAttentionConfig((16, 1), 0.3, coarse="per_query", first_blocks=1)
    named = dataclasses.replace(square, query_rows=16)
    mask = AttentionMask.causal(100)
    a, b = (mra_attention(*tokens, config=c, mask=mask, impl=impl) for c in (square, named))
    assert torch.equal(a.output, b.output)


@pytest.mark.parametrize("impl", IMPLS)
def test_patches_of_keys_nest_in_patches_of_queries(impl):
    """On a picture: queries of a block and the keys of its own blocks are the same patch."""
    config = dataclasses.replace(CONFIG, grid=(16, 16), diagonal_blocks=1, budget=1 / 8)
    tokens = make_qkv(3, n=257, m=257, dtype=torch.float32)
    result = mra_attention(*tokens, config=config, impl=impl)
    exact = mra_attention(*tokens, config=dataclasses.replace(config, budget=1.0), impl=impl)
    plain = torch.nn.functional.scaled_dot_product_attention(*tokens, enable_gqa=True)
    torch.testing.assert_close(exact.output, plain, rtol=1e-4, atol=1e-5)
    # Slots: a block of 32 for the class token, then eight patches of 4 x 8.
    chosen = opened(result.selection, 9, 36)
    assert chosen[:, :, 0, 0].all()
    for row in range(1, 9):
        assert chosen[:, :, row, 4 * row : 4 * row + 4].all()


@pytest.mark.parametrize(
    "change", [{"query_rows": 12}, {"query_rows": 4}, {"resolutions": (16, 4, 1)}]
)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=r"a multiple of the block side .* got query_rows="):
        dataclasses.replace(CONFIG, **change)
