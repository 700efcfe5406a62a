"""Which keys each block of queries opens: the nearest that the budget of its head pays for."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.keys_estimate import (
    SILENT,
    STEPS,
    are_real,
    distances,
    each_key,
    most_of_blocks,
    tile_rows,
)
from mra_kernels._triton.primitives import (
    PADDING,
    QUERIES,
    ROW_FACTS,
    block_row_facts,
    load_rows,
    run_of_rows,
)


@triton.jit
def _prices(ROWS, block, inside, segment):
    """Queries that each block of the segment computes a key for, 0 for other blocks."""
    at = ROWS + block.to(tl.int64) * ROW_FACTS
    mine = tl.load(at + PADDING, mask=inside, other=-1) == segment
    return tl.where(mine, tl.load(at + QUERIES, mask=inside, other=0), 0).to(tl.int64), mine


@triton.jit
def limit_kernel(
    TALLIES, ROWS, BUDGETS, LIMITS, QUOTAS, heads, blocks, mask_step,
    SEGMENTS: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """Below which distance each block opens all keys, and how many it opens at that distance, the
    first ones. Blocks of padding are a segment with a budget of its own. Grid: (batch * heads,)."""
    head = tl.program_id(0).to(tl.int64)
    batch = head // heads * mask_step
    ROWS += batch * blocks * ROW_FACTS
    BUDGETS += (batch * heads + head % heads) * 2
    TALLIES += head * blocks * STEPS
    step = tl.arange(0, STEPS)
    for segment in range(0, SEGMENTS):
        total = tl.zeros([STEPS], tl.int64)
        for block_0 in range(0, blocks, RB):
            block = block_0 + tl.arange(0, RB)
            price, _mine = _prices(ROWS, block, block < blocks, segment)
            at = TALLIES + block.to(tl.int64)[:, None] * STEPS + step[None, :]
            tally = tl.load(at, mask=(block < blocks)[:, None], other=0)
            total += tl.sum(tally * price[:, None], 0)
        budget = tl.load(BUDGETS + segment)
        last = tl.sum((tl.cumsum(total, 0) <= budget).to(tl.int32), 0)
        rest = budget - tl.sum(tl.where(step < last, total, 0), 0)
        # The distance at which the money runs out: blocks take their turns in order.
        edge = tl.minimum(last, STEPS - 1)
        spent = tl.zeros([], tl.int64)
        for block_0 in range(0, blocks, RB):
            block = block_0 + tl.arange(0, RB)
            price, mine = _prices(ROWS, block, block < blocks, segment)
            tally = tl.load(
                TALLIES + block.to(tl.int64) * STEPS + edge, mask=block < blocks, other=0
            )
            cost = tally * price
            left = tl.maximum(rest - spent - tl.cumsum(cost, 0) + cost, 0)
            quota = tl.minimum(left // tl.maximum(price, 1), tally).to(tl.int32)
            every = (quota == tally) & (last < STEPS)
            to = head * blocks + block
            tl.store(LIMITS + to, last + every.to(tl.int32), mask=mine)
            tl.store(QUOTAS + to, tl.where(every | (last == STEPS), 0, quota), mask=mine)
            spent += tl.sum(cost, 0)


@triton.jit
def _last_turns(
    q, zero, unit, K, KEY_VALID, limit, quota, whole_first, whole_stop, favoured, first, last, m,
    BLOCKS: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One past the last key at the limit that each block opens, for each key and block: 0 where
    the quota is."""
    taken = tl.zeros([BLOCKS], tl.int32)
    end = tl.zeros([BLOCKS], tl.int32)
    for key_0 in range(first, last, BN):
        row = key_0 + tl.arange(0, BN)
        k = load_rows(K, row, RP, row < m, RP, RP)
        key = key_0 + tl.arange(0, BN * BLOCKS) // BLOCKS
        steps = distances(k, q, zero, unit, key, favoured, BLOCKS, SIDE, BN)
        whole = (key >= whole_first) & (key < whole_stop) & are_real(KEY_VALID, key, m)
        at_limit = tl.reshape((whole & (steps == limit)).to(tl.int32), [BN, BLOCKS])
        turn = taken[None, :] + tl.cumsum(at_limit, 0)
        mine = (at_limit == 1) & (turn <= quota[None, :])
        end = tl.maximum(end, tl.max(tl.where(mine, row[:, None] + 1, 0), 0))
        taken += tl.sum(at_limit, 0)
    return each_key(end, BLOCKS, BN)


@triton.jit
def _open_run(
    q, zero, unit, K, OPEN, KEY_VALID, limit, end, begin, stop, whole_first, whole_stop, favoured,
    first, last, gap_first, gap_stop, m, words, there,
    BLOCKS: tl.constexpr, SIDE: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Bits of the keys ``[first, last)`` but for the gap's; the mask may ``CUT`` some of them."""
    WORDS: tl.constexpr = BN // 32
    gap = gap_stop - gap_first
    for at in range(first, last - gap, BN):
        key_0 = tl.where(at < gap_first, at, at + gap)
        row = key_0 + tl.arange(0, BN)
        k = load_rows(K, row, RP, row < m, RP, RP)
        key = key_0 + tl.arange(0, BN * BLOCKS) // BLOCKS
        steps = distances(k, q, zero, unit, key, favoured, BLOCKS, SIDE, BN)
        opened = (steps < limit) | ((steps == limit) & (key < end))
        if CUT:
            whole = (key >= whole_first) & (key < whole_stop)
            seen = (row[:, None] >= begin[None, :]) & (row[:, None] < stop[None, :])
            any_row = most_of_blocks(seen.to(tl.int32), BLOCKS, SIDE, BN)
            opened = tl.where(whole, opened, any_row == 1)
        opened = opened & are_real(KEY_VALID, key, m)
        bits = tl.reshape(opened.to(tl.int32), [WORDS, 32, BLOCKS])
        word = tl.sum(bits << tl.arange(0, 32)[None, :, None], 1)
        inside = (key_0 // 32 + tl.arange(0, WORDS) < words)[:, None]
        tl.store(OPEN + key_0 // 32, word, mask=inside & there[None, :])


@triton.jit
def open_kernel(
    Q, K, UNIT, ZERO, ROWS, INTERVALS, FIRST_KEY, KEY_VALID, LIMITS, QUOTAS, OPEN,
    heads, n, m, blocks, words, first_keys, mask_step,
    SIDE: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bits of the keys that are opened: those within the limit, and those that the mask cuts.
    Grid: (tiles of ``BM`` queries, batch * heads)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    Q += head * n * RP
    K += head * m * RP
    INTERVALS += batch * n * 2
    if KEY_VALID is not None:
        KEY_VALID += batch * m
    BLOCKS: tl.constexpr = BM // SIDE
    WORDS: tl.constexpr = BN // 32
    query = tile * BM + tile_rows(BLOCKS, SIDE)
    inside = query < n
    q = load_rows(Q, query, RP, inside, RP, RP)
    zero = tl.load(ZERO + head * n + query, mask=inside, other=SILENT)
    begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
    stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    unit = tl.load(UNIT + head * blocks + block, mask=there, other=1.0)
    limit = tl.load(LIMITS + head * blocks + block, mask=there, other=0)
    quota = tl.load(QUOTAS + head * blocks + block, mask=there, other=0)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(
        ROWS + batch * blocks * ROW_FACTS, block, there
    )
    favoured = tl.load(FIRST_KEY + batch) + first_keys
    first, last = run_of_rows(seen_first, seen_stop, there, m, BN)
    # What is whole for all blocks, in steps.
    inner = tl.cdiv(tl.max(tl.where(there, whole_first, 0), 0), BN) * BN
    inner = tl.minimum(tl.maximum(inner, first), tl.cdiv(last, BN) * BN)
    outer = tl.maximum(tl.min(tl.where(there, whole_stop, m), 0) // BN * BN, inner)
    OPEN += (head * blocks + block)[None, :] * words + tl.arange(0, WORDS)[:, None]
    for word_0 in range(0, words, WORDS):
        word = word_0 + tl.arange(0, WORDS)
        unseen = ((word * 32 < first) | (word * 32 >= last)) & (word < words)
        none = tl.zeros([WORDS, BLOCKS], tl.int32)
        tl.store(OPEN + word_0, none, mask=unseen[:, None] & there[None, :])
    unit = each_key(unit, BLOCKS, BN)
    limit = each_key(limit, BLOCKS, BN)
    whole_first = each_key(whole_first, BLOCKS, BN)
    whole_stop = each_key(whole_stop, BLOCKS, BN)
    end = tl.zeros([BN * BLOCKS], tl.int32)
    if tl.max(quota, 0) > 0:
        end = _last_turns(
            q, zero, unit, K, KEY_VALID, limit, quota, whole_first, whole_stop, favoured,
            first, last, m, BLOCKS, SIDE, RP, BN,
        )  # fmt: skip
    _open_run(
        q, zero, unit, K, OPEN, KEY_VALID, limit, end, begin, stop, whole_first, whole_stop,
        favoured, first, last, inner, outer, m, words, there, BLOCKS, SIDE, RP, BN, True,
    )  # fmt: skip
    _open_run(
        q, zero, unit, K, OPEN, KEY_VALID, limit, end, begin, stop, whole_first, whole_stop,
        favoured, inner, outer, inner, inner, m, words, there, BLOCKS, SIDE, RP, BN, False,
    )  # fmt: skip
