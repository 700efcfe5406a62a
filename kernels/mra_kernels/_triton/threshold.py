"""From which score on a budget pays for all whole pairs: exactly, without a matrix of scores.

Whole pairs are ordered by a 60-bit key that no two share: favoured by a prior, then score, then
index. Tallies of pairs and their costs by the leading bits of their keys narrow it down to the key
sought. What a tally needs of a pair it works out again from the means.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.pairs import (
    COST_BITS,
    KEY_BITS,
    NOTHING,
    ONE_PAIR,
    pair_logits,
    real_keys,
    sort_keys,
)
from mra_kernels._triton.primitives import (
    PADDING,
    QUERIES,
    ROW_FACTS,
    block_row_facts,
    load_rows,
    run_of_rows,
)
from mra_kernels._triton.search import lowest_paid

CANDIDATES = 1024
"""Pairs a head whose keys are written down, once so few are left: a program can hold them."""
_SCANNED = tl.constexpr(2048)
"""Tallies looked through at a time."""
_BUCKETS = tl.constexpr(8)
_BUCKET_BITS = tl.constexpr(3)


@triton.jit
def _best_of_rows(
    q, K_MEANS, KEYS, seen_first, seen_stop, cols, scaling, softcap,
    D: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    best = tl.full([RB], float("-inf"), tl.float32)
    begin, end = run_of_rows(seen_first, seen_stop, seen_first < seen_stop, cols, CB)
    for col_0 in range(begin, end, CB):
        col = col_0 + tl.arange(0, CB)
        logits = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
        _n_keys, real = real_keys(KEYS, col, cols)
        seen = (col[None, :] >= seen_first[:, None]) & (col[None, :] < seen_stop[:, None])
        best = tl.maximum(best, tl.max(tl.where(seen & real[None, :], logits, float("-inf")), 1))
    return best


@triton.jit
def _keys_and_worth(
    q, K_MEANS, KEYS, row, col, best, n_queries, whole_first, whole_stop, inside, cols,
    scaling, softcap, offset, first_row, first_col,
    D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr, QUERY_ROWS: tl.constexpr,
    RB: tl.constexpr, CB: tl.constexpr,
    BY_COUNT: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sort keys, and what a whole pair adds to a tally: its cost and one pair. 0 for others."""
    scores = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
    n_keys, real = real_keys(KEYS, col, cols)
    whole = (col[None, :] >= whole_first[:, None]) & (col[None, :] < whole_stop[:, None])
    whole = whole & (inside[:, None] & real[None, :])
    key = sort_keys(
        scores - best[:, None],
        row,
        col,
        cols,
        offset,
        first_row,
        first_col,
        SIDE,
        QUERY_ROWS,
        FIRST,
        DIAGONAL,
    )
    cost = n_queries[:, None] * n_keys[None, :]
    if BY_COUNT:
        cost = tl.full([RB, CB], 1, tl.int32)
    return key, tl.where(whole, cost.to(tl.int64) + ONE_PAIR, 0)


@triton.jit
def _narrowed(tally, low, left, shift):
    """One digit more of the key sought, for each row of tallies ``[rows, 8]``.

    Returns:
        The bucket it is in, -1 if all are paid for; the bottom of that, how many pairs are in it,
        and what is left for them.
    """
    bucket = tl.arange(0, _BUCKETS)[None, :]
    cost = tally & (ONE_PAIR - 1)
    cost_from = tl.sum(cost, 1)[:, None] - tl.cumsum(cost, 1) + cost
    chosen = tl.max(tl.where(cost_from > left[:, None], bucket, -1), 1)
    here = bucket == chosen[:, None]
    count = tl.sum(tl.where(here, tally >> COST_BITS, 0), 1)
    spent = tl.sum(tl.where(here, cost_from - cost, 0), 1)
    return chosen, low + (chosen.to(tl.int64) << shift), count, left - spent


@triton.jit
def _tally(key, worth, low, shift):
    """Sums of ``worth`` by the three bits of ``key - low`` above ``shift``, ``[rows, 8]``."""
    place = (key - low) >> shift
    bucket = tl.arange(0, _BUCKETS)[None, :]
    tally = tl.sum(tl.where(place == 0, worth, 0), 1)[:, None] * (bucket == 0)
    for each in tl.static_range(1, _BUCKETS):
        tally += tl.sum(tl.where(place == each, worth, 0), 1)[:, None] * (bucket == each)
    return tally


@triton.jit
def row_threshold_kernel(
    Q_MEANS, K_MEANS, ROWS, KEYS, BUDGETS, FIRSTS, BEST, THRESHOLDS,
    scaling, softcap, offset, heads, rows, cols, room, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr,
    QUERY_ROWS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    BY_COUNT: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The lowest key that is paid for, of each row of blocks. Grid: (tiles, batch * heads)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    K_MEANS += head // GROUP * room * D
    ROWS += batch * rows * ROW_FACTS
    KEYS += batch * cols
    first_row = tl.load(FIRSTS + 2 * batch)
    first_col = tl.load(FIRSTS + 2 * batch + 1)
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    inside = row < rows
    left = tl.load(BUDGETS + batch * rows + row, mask=inside, other=-1)
    q = load_rows(Q_MEANS + head * rows * D, row, D, inside, D, DP)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
    n_queries = tl.load(ROWS + row.to(tl.int64) * ROW_FACTS + QUERIES, mask=inside, other=0)
    best = tl.zeros([RB], tl.float32)
    if LESS_BEST:
        best = _best_of_rows(
            q, K_MEANS, KEYS, seen_first, seen_stop, cols, scaling, softcap,
            D, DP, RB, CB, CAPPED, PRECISION,
        )  # fmt: skip
        tl.store(BEST + head * rows + row, best, mask=inside)
    low = tl.zeros([RB], tl.int64)
    threshold = tl.full([RB], NOTHING, tl.int64)
    searching = left >= 0
    begin, end = run_of_rows(whole_first, whole_stop, inside, cols, CB)
    shift = KEY_BITS - _BUCKET_BITS
    while (shift >= 0) & (tl.max(searching.to(tl.int32), 0) > 0):
        tally = tl.zeros([RB, _BUCKETS], tl.int64)
        for col_0 in range(begin, end, CB):
            key, worth = _keys_and_worth(
                q, K_MEANS, KEYS, row, col_0 + tl.arange(0, CB), best, n_queries, whole_first,
                whole_stop, inside, cols, scaling, softcap, offset, first_row, first_col,
                D, DP, SIDE, QUERY_ROWS, RB, CB, BY_COUNT, CAPPED, FIRST, DIAGONAL, PRECISION,
            )  # fmt: skip
            tally += _tally(key, worth, low[:, None], shift)
        chosen, bottom, count, rest = _narrowed(tally, low, left, shift)
        # No bucket costs too much: all are paid for. One pair left: it is the one that does.
        found = tl.where(chosen < 0, low, bottom + (tl.full([RB], 1, tl.int64) << shift))
        ends = searching & ((chosen < 0) | (count <= 1) | (shift == 0))
        threshold = tl.where(ends, found, threshold)
        searching = searching & (ends == 0)
        low = tl.where(searching, bottom, low)
        left = tl.where(searching, rest, left)
        shift -= _BUCKET_BITS
    tl.store(THRESHOLDS + head * rows + row, threshold, mask=inside)


@triton.jit
def _sweep(
    Q_MEANS, K_MEANS, ROWS, KEYS, BEST, FOUND, CURSOR, low, shift, segment,
    rows, cols, scaling, softcap, offset, first_row, first_col,
    D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr, QUERY_ROWS: tl.constexpr,
    RB: tl.constexpr, CB: tl.constexpr,
    WRITE: tl.constexpr, BY_COUNT: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores all pairs of a head again. To ``WRITE`` down those whose key starts like ``low``, each
    with its worth; else their tally, ``[1, 8]``."""
    tally = tl.zeros([RB, _BUCKETS], tl.int64)
    for row_0 in range(0, rows, RB):
        row = row_0 + tl.arange(0, RB)
        inside = row < rows
        q = load_rows(Q_MEANS, row, D, inside, D, DP)
        whole_first, whole_stop, _first, _stop = block_row_facts(ROWS, row, inside)
        facts = ROWS + row.to(tl.int64) * ROW_FACTS
        n_queries = tl.load(facts + QUERIES, mask=inside, other=0)
        inside = tl.load(facts + PADDING, mask=inside, other=-1) == segment
        best = tl.zeros([RB], tl.float32)
        if LESS_BEST:
            best = tl.load(BEST + row, mask=inside, other=0.0)
        begin, end = run_of_rows(whole_first, whole_stop, inside, cols, CB)
        for col_0 in range(begin, end, CB):
            key, worth = _keys_and_worth(
                q, K_MEANS, KEYS, row, col_0 + tl.arange(0, CB), best, n_queries, whole_first,
                whole_stop, inside, cols, scaling, softcap, offset, first_row, first_col,
                D, DP, SIDE, QUERY_ROWS, RB, CB, BY_COUNT, CAPPED, FIRST, DIAGONAL, PRECISION,
            )  # fmt: skip
            if WRITE:
                mine = (worth != 0) & ((key - low) >> shift == 0)
                to = tl.atomic_add(
                    CURSOR + tl.zeros([RB, CB], tl.int32), 1, mask=mine, sem="relaxed"
                )
                to = tl.where(mine, to, 0).to(tl.int64) * 2
                tl.store(FOUND + to, key, mask=mine)
                tl.store(FOUND + to + 1, worth, mask=mine)
            else:
                tally += _tally(key, worth, low, shift)
    return tl.sum(tally, 0)[None, :]


@triton.jit
def head_threshold_kernel(
    Q_MEANS, K_MEANS, ROWS, KEYS, BUDGETS, FIRSTS, BEST, THRESHOLDS, TALLIES, ARRIVED, CURSORS,
    FOUND, scaling, softcap, offset, heads, rows, cols, room, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr,
    QUERY_ROWS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, SEGMENTS: tl.constexpr,
    FIRST_BITS: tl.constexpr, CANDIDATES: tl.constexpr,
    BY_COUNT: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The lowest key that is paid for, of a head's real rows and of those that are padding.

    All programs of a head tally the leading bits; the last to finish goes on alone: it writes down
    the keys that share those bits with the one sought, and searches them. ``TALLIES``, ``ARRIVED``
    and ``CURSORS`` must come zeroed. Grid: (tiles of ``RB`` rows of blocks, batch * heads).
    """
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    Q_MEANS += head * rows * D
    K_MEANS += head // GROUP * room * D
    ROWS += batch * rows * ROW_FACTS
    KEYS += batch * cols
    BEST += head * rows
    TALLIES += head * SEGMENTS << FIRST_BITS
    FOUND += head * CANDIDATES * 2
    first_row = tl.load(FIRSTS + 2 * batch)
    first_col = tl.load(FIRSTS + 2 * batch + 1)
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    inside = row < rows
    q = load_rows(Q_MEANS, row, D, inside, D, DP)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
    at = ROWS + row.to(tl.int64) * ROW_FACTS
    n_queries = tl.load(at + QUERIES, mask=inside, other=0)
    padding = tl.load(at + PADDING, mask=inside, other=0)
    best = tl.zeros([RB], tl.float32)
    if LESS_BEST:
        best = _best_of_rows(
            q, K_MEANS, KEYS, seen_first, seen_stop, cols, scaling, softcap,
            D, DP, RB, CB, CAPPED, PRECISION,
        )  # fmt: skip
        tl.store(BEST + row, best, mask=inside)
    LOW: tl.constexpr = KEY_BITS - FIRST_BITS
    begin, end = run_of_rows(whole_first, whole_stop, inside, cols, CB)
    for col_0 in range(begin, end, CB):
        key, worth = _keys_and_worth(
            q, K_MEANS, KEYS, row, col_0 + tl.arange(0, CB), best, n_queries, whole_first,
            whole_stop, inside, cols, scaling, softcap, offset, first_row, first_col,
            D, DP, SIDE, QUERY_ROWS, RB, CB, BY_COUNT, CAPPED, FIRST, DIAGONAL, PRECISION,
        )  # fmt: skip
        place = (key >> LOW) + (padding.to(tl.int64) << FIRST_BITS)[:, None]
        tl.atomic_add(TALLIES + place, worth, mask=worth != 0, sem="relaxed")
    tl.debug_barrier()
    arrived = tl.atomic_add(ARRIVED + head, 1)
    if arrived == tl.num_programs(0) - 1:
        for segment in range(0, SEGMENTS):
            left = tl.load(BUDGETS + batch * 2 + segment)
            # The leading bits, from the top.
            above = tl.full([], 0, tl.int64)
            chosen = tl.full([], -1, tl.int32)
            count = tl.full([], 0, tl.int64)
            for skipped in range(0, 1 << FIRST_BITS, _SCANNED):
                bucket = (1 << FIRST_BITS) - 1 - skipped - tl.arange(0, _SCANNED)
                tally = tl.load(TALLIES + (segment << FIRST_BITS) + bucket)
                cost = tally & (ONE_PAIR - 1)
                cost_from = above + tl.cumsum(cost, 0)
                first = tl.max(tl.where(cost_from > left, bucket, -1), 0)
                new = (first >= 0) & (chosen < 0)
                here = bucket == first
                spent = tl.sum(tl.where(here, cost_from - cost, 0), 0)
                count = tl.where(new, tl.sum(tl.where(here, tally >> COST_BITS, 0), 0), count)
                left = tl.where(new, left - spent, left)
                above += tl.sum(cost, 0)
                chosen = tl.where(new, first, chosen)
            low = chosen.to(tl.int64) << LOW
            shift = tl.full([], LOW, tl.int32)
            # While too many share them, three bits more: all pairs are scored again.
            while (count > CANDIDATES) & (shift > 0) & (chosen >= 0) & (left >= 0):
                shift = tl.maximum(shift - _BUCKET_BITS, 0)
                tally = _sweep(
                    Q_MEANS, K_MEANS, ROWS, KEYS, BEST, FOUND, CURSORS, low, shift, segment,
                    rows, cols, scaling, softcap, offset, first_row, first_col,
                    D, DP, SIDE, QUERY_ROWS, RB, CB, False, BY_COUNT, LESS_BEST, CAPPED, FIRST,
                    DIAGONAL, PRECISION,
                )  # fmt: skip
                _digits, bottoms, counts, rests = _narrowed(
                    tally, low + tl.zeros([1], tl.int64), left + tl.zeros([1], tl.int64), shift
                )
                low, count, left = tl.max(bottoms, 0), tl.max(counts, 0), tl.max(rests, 0)
            # The one pair left, or the ties down to the last bit, is what costs too much.
            found = low + (tl.full([], 1, tl.int64) << shift)
            if (count > 1) & (shift > 0) & (chosen >= 0) & (left >= 0):
                _sweep(
                    Q_MEANS, K_MEANS, ROWS, KEYS, BEST, FOUND,
                    CURSORS + head * SEGMENTS + segment, low, shift, segment,
                    rows, cols, scaling, softcap, offset, first_row, first_col,
                    D, DP, SIDE, QUERY_ROWS, RB, CB, True, BY_COUNT, LESS_BEST, CAPPED, FIRST,
                    DIAGONAL, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                one = tl.arange(0, CANDIDATES)[None, :]
                keys = tl.load(FOUND + one * 2, mask=one < count, other=0)
                worths = tl.load(FOUND + one * 2 + 1, mask=one < count, other=0)
                costs = (worths & (ONE_PAIR - 1)).to(tl.int32)
                found = tl.max(lowest_paid(keys, costs, left + tl.zeros([1], tl.int64)), 0)
                tl.debug_barrier()
            found = tl.where(chosen < 0, tl.full([], 0, tl.int64), found)
            budget = tl.load(BUDGETS + batch * 2 + segment)
            found = tl.where(budget < 0, tl.full([], NOTHING, tl.int64), found)
            tl.store(THRESHOLDS + head * 2 + segment, found)
