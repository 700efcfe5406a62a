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
from mra_kernels._triton.search import lowest_paid


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
        threshold = lowest_paid(key, cost, budget)
    else:
        padding = tl.load(facts + PADDING, mask=inside, other=-1)
        threshold = tl.full([RB], NOTHING, tl.int64)
        for segment in tl.static_range(SEGMENTS):
            budget = tl.load(BUDGETS + batch * 2 + segment) + tl.zeros([1], tl.int64)
            mine = tl.where(padding[:, None] == segment, cost, 0)
            lowest = lowest_paid(
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
