"""Choosing and opening in one launch, where a program can hold all pairs that compete: those of a
row of blocks, or of a head with few of them."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.pairs import (
    NOTHING,
    coarse_step,
    pair_logits,
    pairs_between,
    real_keys,
    sort_keys,
    store_coarse,
    store_opened,
)
from mra_kernels._triton.primitives import (
    PADDING,
    QUERIES,
    ROW_FACTS,
    STARVING,
    block_row_facts,
    load_rows,
)

_DIGIT = tl.constexpr(3)
_VALUES = tl.constexpr(8)
"""Bits of the key sought that a turn finds, and what they can be."""


@triton.jit
def _extremes(key, chosen):
    """Lowest and highest key of each row that is chosen."""
    return tl.min(tl.where(chosen, key, NOTHING), 1), tl.max(tl.where(chosen, key, -1), 1)


@triton.jit
def _lowest_paid(key, cost, budget):
    """The lowest key from which on ``budget`` pays, of each row of a tile.

    ``cost`` is int32, 0 for what doesn't compete. Of the keys among which the one sought is, those
    are kept that agree with it in the next digit in which they differ at all.
    """
    left = tl.minimum(tl.maximum(budget, -1), 0x7FFFFFFF).to(tl.int32)
    lowest = tl.where(left < 0, NOTHING, tl.zeros_like(budget))
    searching = (left >= 0) & (tl.sum(cost, 1) > left)
    bottom, top = _extremes(key, cost > 0)
    while tl.max(searching.to(tl.int32), 0) > 0:
        # The exponent of a float is the place of the highest bit, or one more where it was rounded.
        differing = tl.maximum(top ^ bottom, 1).to(tl.float32).to(tl.int32, bitcast=True)
        shift = tl.maximum((differing >> 23) - 127 - (_DIGIT - 1), 0)
        low = (top >> (shift + _DIGIT)) << (shift + _DIGIT)
        place = (key - low[:, None]) >> shift[:, None]
        # Not all keys that share the leading digits: those above the top are paid for already.
        here = tl.where((key >= bottom[:, None]) & (key <= top[:, None]), cost, 0)
        digit = tl.zeros_like(left)
        spent = tl.zeros_like(left)
        for each in tl.static_range(1, _VALUES):
            above = tl.sum(tl.where(place >= each, here, 0), 1)
            digit += (above > left).to(tl.int32)
            spent = tl.maximum(spent, tl.where(above > left, 0, above))
        left -= spent
        bottom, top = _extremes(key, (place == digit[:, None]) & (here > 0))
        ends = searching & (bottom == top)
        lowest = tl.where(ends, top + 1, lowest)
        searching = searching & (bottom < top)
    return lowest


@triton.jit
def choose_kernel(
    Q_MEANS, K_MEANS, V_MEANS, ROWS, KEYS, BUDGETS, FIRSTS, OPEN, RESCUED, PEAK, MASS, WEIGHTED,
    scaling, softcap, offset, heads, rows, cols, room, words, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    SIDE: tl.constexpr, QUERY_ROWS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    SEGMENTS: tl.constexpr, BY_ROW: tl.constexpr, BY_COUNT: tl.constexpr,
    LESS_BEST: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
    POOLED: tl.constexpr, RESCUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The threshold and what `selection.open_kernel` does. A tile holds all columns and, unless
    ``BY_ROW``, all rows of blocks. Grid: (tiles of ``RB`` rows of blocks, batch * heads)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    K_MEANS += head // GROUP * room * D
    V_MEANS += head // GROUP * room * DV
    ROWS += batch * rows * ROW_FACTS
    first_row = tl.load(FIRSTS + 2 * batch)
    first_col = tl.load(FIRSTS + 2 * batch + 1)
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    col = tl.arange(0, CB)
    inside = row < rows
    q = load_rows(Q_MEANS + head * rows * D, row, D, inside, D, DP)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
    facts = ROWS + row.to(tl.int64) * ROW_FACTS
    logits = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
    n_keys, real = real_keys(KEYS + batch * cols, col, cols)
    whole = pairs_between(col, whole_first, whole_stop, real)
    seen = pairs_between(col, seen_first, seen_stop, real)
    scores = logits
    if LESS_BEST:
        scores = logits - tl.max(tl.where(seen, logits, float("-inf")), 1)[:, None]
    key = sort_keys(
        scores, row, col, cols, offset, first_row, first_col, SIDE, QUERY_ROWS, FIRST, DIAGONAL
    )
    cost = whole.to(tl.int32)
    if not BY_COUNT:
        n_queries = tl.load(facts + QUERIES, mask=inside, other=0)
        cost = cost * (n_queries[:, None] * n_keys[None, :])
    if BY_ROW:
        budget = tl.load(BUDGETS + batch * rows + row, mask=inside, other=-1)
        threshold = _lowest_paid(key, cost, budget)
    else:
        padding = tl.load(facts + PADDING, mask=inside, other=-1)
        threshold = tl.full([RB], NOTHING, tl.int64)
        for segment in tl.static_range(SEGMENTS):
            budget = tl.load(BUDGETS + batch * 2 + segment) + tl.zeros([1], tl.int64)
            mine = tl.where(padding[:, None] == segment, cost, 0)
            lowest = _lowest_paid(
                tl.reshape(key, [1, RB * CB]), tl.reshape(mine, [1, RB * CB]), budget
            )
            threshold = tl.where(padding == segment, lowest, threshold)
    paid = key >= threshold[:, None]
    if RESCUE:
        # A row of blocks in which a query would see nothing gets its best whole pair.
        served = tl.load(facts + STARVING, mask=inside, other=0) == 0
        served = served | (tl.max((whole & paid).to(tl.int32), 1) > 0)
        of_whole = tl.where(whole, logits, float("-inf"))
        top = tl.max(of_whole, 1)
        lowest = tl.min(tl.where(whole & (of_whole == top[:, None]), col[None, :], cols), 1)
        rescued = tl.where(served | (lowest == cols), -1, lowest)
        tl.store(RESCUED + head * rows + row, rescued, mask=inside)
        paid = paid | (col[None, :] == rescued[:, None])
    opened = seen & (paid | (whole == 0))
    store_opened(OPEN + (head * rows + row)[:, None] * words, opened, 0, words, inside, RB, CB)
    if POOLED:
        peak = tl.full([RB], float("-inf"), tl.float32)
        mass = tl.zeros([RB], tl.float32)
        weighted = tl.zeros([RB, DVP], tl.float32)
        peak, mass, weighted = coarse_step(
            logits, whole & (opened == 0), n_keys, V_MEANS, col, cols, peak, mass, weighted,
            DV, DVP, PRECISION,
        )  # fmt: skip
        store_coarse(PEAK, MASS, WEIGHTED, head * rows + row, inside, peak, mass, weighted, DV, DVP)
