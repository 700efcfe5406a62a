"""Masks as intervals: against plain index arithmetic, and against transformers' own masks."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from mra_cli.calls import AttentionCall
from mra_cli.host import LazyMask, lazy_mask, read_mask
from mra_kernels import AttentionMask, exact_attention

N = 23


def positions(n=N, m=N, offset=0):
    return torch.arange(n)[:, None] + offset, torch.arange(m)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (AttentionMask.full(N, 9), lambda i, j: (i >= 0) & (j < 9)),
        (AttentionMask.causal(N), lambda i, j: j <= i),
        (AttentionMask.causal(N, window=4), lambda i, j: (j <= i) & (j > i - 4)),
        (AttentionMask.causal(N, chunk=5), lambda i, j: (j <= i) & (j // 5 == i // 5)),
        (AttentionMask.causal(5, N), lambda i, j: j <= i),
        (AttentionMask.causal(5, N, offset=2), lambda i, j: j <= i),
    ],
)
def test_constructors(mask, expected):
    i, j = positions(mask.n_queries, mask.n_keys, mask.query_offset)
    assert torch.equal(mask.rows(0, mask.n_queries)[0], expected(i, j))


@pytest.mark.parametrize("side", [1, 4, 7, 32])
@pytest.mark.parametrize("own", ["matrix", "padding", "intervals"])
def test_tiles_and_counts_agree_with_the_matrix(side, own):
    """Of the two in a batch, each has its own."""
    generator = torch.Generator().manual_seed(side)
    if own == "matrix":
        visible = torch.rand(2, N, 19, generator=generator) < 0.5
        mask = AttentionMask.from_dense(visible)
        assert mask.dense is not None
    else:
        valid = torch.rand(2, 19, generator=generator) < 0.7
        mask = AttentionMask.causal(N, 19, offset=1, window=9)
        if own == "intervals":
            low = torch.stack([mask.start[0], mask.stop[0] // 2])
            mask, valid = AttentionMask(low, mask.stop.expand(2, -1), 19), valid[:1]
        mask = mask.with_padding(valid)
        visible = mask.rows(0, N)
    rows, cols = -(-N // side), -(-19 // side)
    batch, row, col = (
        x.flatten()
        for x in torch.meshgrid(
            torch.arange(2), torch.arange(rows), torch.arange(cols), indexing="ij"
        )
    )
    padded = torch.nn.functional.pad(visible, (0, cols * side - 19, 0, rows * side - N))
    expected = padded.view(2, rows, side, cols, side).transpose(2, 3).reshape(-1, side, side)
    assert torch.equal(mask.tiles(batch, row, col, side), expected)
    assert torch.equal(mask.tile_row_counts(batch, row, col, side), expected.sum(-1))
    assert torch.equal(mask.tile_counts(batch, row, col, side), expected.sum((1, 2)))
    assert torch.equal(mask.legal_per_row().expand(2, -1), visible.sum(-1))


def request(function, padding=None, q=N, kv=N, q_offset=0, kv_offset=0, batch=2):
    return {
        "batch_size": batch,
        "q_length": q,
        "kv_length": kv,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
    }


LEFT = torch.ones(2, N, dtype=torch.bool)
LEFT[1, :6] = False
PACKED = torch.tensor([[0] * 9 + [1] * 14] * 2)
IMAGE = torch.full((2, N), -1)
IMAGE[:, 4:9] = 0


def same_image(batch, head, query, key):
    return (IMAGE[batch, query] == IMAGE[batch, key]) & (IMAGE[batch, query] >= 0)


TRANSFORMERS_MASKS = {
    "causal": (request(causal_mask_function), True),
    "causal, left padding": (request(causal_mask_function, LEFT), True),
    "bidirectional, right padding": (request(bidirectional_mask_function, LEFT.flip(1)), True),
    "sliding window": (request(sliding_window_causal_mask_function(5), LEFT), True),
    "both-sided window": (request(sliding_window_bidirectional_mask_function(3)), True),
    "chunks with left padding": (
        request(chunked_causal_mask_function(6, torch.tensor([0, 6])), LEFT),
        True,
    ),
    "chunked prefill": (request(causal_mask_function, LEFT, q=7, kv=20, q_offset=13), True),
    "window in a full cache": (
        request(sliding_window_causal_mask_function(8), None, q=1, kv=8, q_offset=15, kv_offset=8),
        True,
    ),
    "static cache": (request(causal_mask_function, LEFT[:, :10], q=10, kv=N), True),
    "packed sequences": (
        request(and_masks(causal_mask_function, packed_sequence_mask_function(PACKED))),
        True,
    ),
    "image tokens see each other": (
        request(or_masks(causal_mask_function, same_image), LEFT),
        True,
    ),
    "every other key": (
        request(and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0)),
        False,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS_MASKS)
def test_lazy_masks_mean_what_transformers_means(name):
    """What we decode (or evaluate) must equal the matrix transformers would have built."""
    kwargs, as_intervals = TRANSFORMERS_MASKS[name]
    expected = sdpa_mask(**kwargs, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)[
        :, 0
    ]
    mask = lazy_mask(**kwargs)
    assert isinstance(mask, LazyMask)
    resolved = mask.resolved()
    assert (resolved.dense is None) == as_intervals
    rows = resolved.rows(0, resolved.n_queries).expand(expected.shape[0], -1, -1)
    unfilled = expected.shape[2] - rows.shape[2]
    assert (unfilled > 0) == (name == "static cache"), "keys not written yet are left out"
    assert torch.equal(torch.nn.functional.pad(rows, (0, unfilled)), expected)


def test_a_static_cache_counts_on_after_the_mask_was_made():
    """Its offset is a live tensor; a lazy mask has to remember the value of the moment."""
    live = torch.tensor(3)
    mask = lazy_mask(**request(causal_mask_function, q=4, kv=10, q_offset=live))
    live += 4
    assert mask.resolved().stop[0].tolist() == [4, 5, 6, 7]


def test_padding_of_keys_is_that_of_queries_only_in_self_attention():
    """Equal lengths don't make the two the same tokens; a decoder's rows may all be real."""
    mask = lazy_mask(**request(bidirectional_mask_function, LEFT))
    assert torch.equal(mask.resolved().query_valid, LEFT)
    assert mask.resolved(cross=True).query_valid is None
    assert torch.equal(mask.resolved(cross=True).key_valid, LEFT)
    assert mask.resolved() is mask.resolved(), "worked out once for all layers"
    later = lazy_mask(**request(causal_mask_function, LEFT, q=7, kv=20, q_offset=13)).resolved()
    assert later.query_valid is None, "the last seven tokens are all real"
    for cross, real in ((False, LEFT), (True, torch.ones_like(LEFT))):
        call = AttentionCall.from_host(
            torch.nn.Linear(1, 1), *torch.randn(3, 2, 4, N, 8), mask, cross=cross, grid=None
        )
        assert torch.equal(call.valid_rows, real)


def test_a_lazy_mask_becomes_a_real_one_when_touched():
    mask = lazy_mask(**request(causal_mask_function, LEFT))
    assert mask.shape == (2, 1, N, N)
    dense = mask.contiguous() & True
    assert not isinstance(dense, LazyMask)
    assert torch.equal(dense[0, 0], torch.ones(N, N, dtype=torch.bool).tril())


def test_masks_of_the_host_s_own_making():
    module = torch.nn.Linear(1, 1)
    query = torch.zeros(2, 4, N, 8)
    padding = torch.zeros(2, 1, 1, N)
    padding[1, ..., 15:] = torch.finfo(torch.float32).min
    mask, bias = read_mask(padding, module, query, N, None)
    assert bias is None and mask.key_valid[1].sum() == 15 and mask.dense is None
    additive = torch.randn(2, 4, N, N)
    mask, bias = read_mask(additive, module, query, N, None)
    assert mask.is_full and torch.equal(bias, additive)
    by_head = torch.rand(2, 4, N, N) < 0.5
    by_head[..., 0] = True  # every row sees something
    mask, bias = read_mask(by_head, module, query, N, None)
    assert mask is None
    query, key, value = torch.randn(3, 2, 4, N, 8).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, by_head)
    torch.testing.assert_close(exact_attention(query, key, value, bias=bias), expected)
    mask, _ = read_mask(None, module, query, N, None)
    assert mask.is_plain_causal, "the host's default, where module and arguments are silent"
    mask, _ = read_mask(None, module, query, N, False)
    assert mask.is_full


def test_causality_is_told_by_the_mask():
    assert AttentionMask.causal(N).is_causal
    assert AttentionMask.causal(N, window=3).is_causal
    assert not AttentionMask.full(N, N).is_causal
    assert not AttentionMask.full(N, 40).is_causal
    both = lazy_mask(**request(sliding_window_bidirectional_mask_function(3))).resolved()
    assert not both.is_causal
    assert both.window == 7
    assert AttentionMask.causal(N, window=3).window == 3
    assert AttentionMask.causal(N).window is None
