"""Pairs of a query block and a key block, scored from block means."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.primitives import (
    LOG2_E,
    floor_div,
    load_rows,
    logits_of,
    softmax_step,
    store_rows,
)

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
        favoured = (row + floor_div(offset, QUERY_ROWS) < first_row + FIRST)[:, None] | (
            col < first_col + FIRST
        )[None, :]
        key += tl.where(favoured, 1 << 32, 0).to(tl.int64)
    if DIAGONAL > 0:
        behind = col[None, :] - floor_div(row * QUERY_ROWS + offset, SIDE)[:, None]
        near = (behind >= -(DIAGONAL // 2)) & (behind < QUERY_ROWS // SIDE + DIAGONAL // 2)
        if FIRST > 0:
            near = near & (key < (1 << 32))
        key += tl.where(near, 1 << 32, 0).to(tl.int64)
    index = row.to(tl.int64)[:, None] * cols + col.to(tl.int64)[None, :]
    return (key << INDEX_BITS) + (_LAST_INDEX - index)


@triton.jit
def pairs_between(col, first, stop, real):
    """Pairs of rows of blocks with the blocks of real keys in their runs, bool ``[rows, cols]``."""
    return (col[None, :] >= first[:, None]) & (col[None, :] < stop[:, None]) & real[None, :]


@triton.jit
def store_opened(OPEN, opened, col_0, words, inside, RB: tl.constexpr, CB: tl.constexpr):
    """Bits of the pairs ``[RB, CB]``, to rows of words ``OPEN`` ``[RB, 1]``."""
    WIDTH: tl.constexpr = 32 if CB > 32 else CB
    bits = tl.reshape(opened.to(tl.int32), [RB, CB // WIDTH, WIDTH])
    sums = tl.sum(bits << tl.arange(0, WIDTH)[None, None, :], 2)
    word = col_0 // 32 + tl.arange(0, CB // WIDTH)
    tl.store(OPEN + word[None, :], sums, mask=inside[:, None] & (word < words)[None, :])


@triton.jit
def coarse_step(
    logits, left, n_keys, V_MEANS, col, cols, peak, mass, weighted,
    DV: tl.constexpr, DVP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`softmax_step` over pairs that are ``left`` at their pooled logits: a block stands for as
    many keys as it holds real ones."""
    size = tl.math.log2(tl.maximum(n_keys, 1).to(tl.float32))
    logits = tl.where(left, logits * LOG2_E + size[None, :], float("-inf"))
    v = load_rows(V_MEANS, col, DV, col < cols, DV, DVP)
    return softmax_step(logits, v, peak, mass, weighted, PRECISION)


@triton.jit
def store_coarse(
    PEAK, MASS, WEIGHTED, to, inside, peak, mass, weighted, DV: tl.constexpr, DVP: tl.constexpr
):
    """The softmax of rows of blocks ``to``."""
    tl.store(PEAK + to, peak, mask=inside)
    tl.store(MASS + to, mass, mask=inside)
    store_rows(WEIGHTED, to, DV, weighted, inside, DV, DVP)
