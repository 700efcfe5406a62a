"""Pairs of a query block and a key block, scored from block means."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.primitives import load_rows, logits_of

INDEX_BITS = tl.constexpr(27)
"""Of a key: 2^27 block pairs a head."""
KEY_BITS = tl.constexpr(60)
NOTHING = tl.constexpr(1 << 61)
"""Above every key."""
COST_BITS = tl.constexpr(36)
ONE_PAIR = tl.constexpr(1 << 36)
"""Of a tally: below this, 2^36 entries a head; above, pairs."""
_LAST_INDEX = tl.constexpr((1 << 27) - 1)


@triton.jit
def pair_logits(
    q, K_MEANS, col, cols, scaling, softcap,
    D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of mean queries ``[RB, DP]`` and the mean keys of blocks ``col``, natural.

    The choice at the end keeps compilers from fusing the last product with what follows, which
    would round the same score differently in different kernels.
    """
    k = load_rows(K_MEANS, col, D, col < cols, D, DP)
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = logits_of(dots, scaling, softcap, CAPPED)
    return tl.where((col < cols)[None, :], logits, 0.0)


@triton.jit
def real_keys(KEYS, col, cols):
    """How many real keys each block has, and whether it has any."""
    n_keys = tl.load(KEYS + col, mask=col < cols, other=0)
    return n_keys, n_keys > 0


@triton.jit
def sort_keys(
    scores, row, col, cols, offset, first_row, first_col,
    SIDE: tl.constexpr, QUERY_ROWS: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Sort keys of pairs, int64: higher goes first."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = bits.to(tl.int64) + (1 << 31)
    if FIRST > 0:
        favoured = (row + offset // QUERY_ROWS < first_row + FIRST)[:, None] | (
            col < first_col + FIRST
        )[None, :]
        key += tl.where(favoured, 1 << 32, 0).to(tl.int64)
    if DIAGONAL > 0:
        behind = col[None, :] - ((row * QUERY_ROWS + offset) // SIDE)[:, None]
        near = (behind >= -(DIAGONAL // 2)) & (behind < QUERY_ROWS // SIDE + DIAGONAL // 2)
        if FIRST > 0:
            near = near & (key < (1 << 32))
        key += tl.where(near, 1 << 32, 0).to(tl.int64)
    index = row.to(tl.int64)[:, None] * cols + col.to(tl.int64)[None, :]
    return (key << INDEX_BITS) + (_LAST_INDEX - index)
