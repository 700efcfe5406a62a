"""From block means to the plan of one call, without a matrix of scores.

A program scores a stretch of block pairs from the means whenever it needs them. Whole pairs are
ordered by a 60-bit key that no two share: favoured by a prior, then score, then index. A radix
search over those keys, eight buckets a pass, finds the one from which on a segment's budget pays
for all, which is what `mra_kernels.selection` opens. A segment is a head, searched by one program,
or a row of blocks. Pairs that the mask cuts through are opened whatever the budget.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.plan import Plan, Settings
from mra_kernels._triton.primitives import (
    LOG2_E,
    PADDING,
    QUERIES,
    ROW_FACTS,
    STARVING,
    block_row_facts,
    load_rows,
    logits_of,
    softmax_step,
)

INDEX_BITS = tl.constexpr(27)
"""Of a key: 2^27 block pairs a head."""
COST_BITS = tl.constexpr(36)
"""Of a bucket's tally: 2^36 entries a head; the rest counts pairs."""
BUCKET_BITS = tl.constexpr(3)
BUCKETS = tl.constexpr(8)
NOTHING = tl.constexpr(1 << 61)
"""Above every key."""


@triton.jit
def _logits(
    q, K_MEANS, col, cols, scaling, softcap,
    D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits of mean queries ``[RB, DP]`` and the mean keys of blocks ``col``, natural."""
    k = load_rows(K_MEANS, col, D, col < cols, D, DP)
    return logits_of(tl.dot(q, tl.trans(k), input_precision="ieee"), scaling, softcap, CAPPED)


@triton.jit
def _is_real(KEYS, col, cols):
    """How many real keys each block has, and whether it has any."""
    n_keys = tl.load(KEYS + col, mask=col < cols, other=0)
    return n_keys, n_keys > 0


@triton.jit
def _keys(
    scores, row, col, cols, offset, first_row, first_col,
    SIDE: tl.constexpr, FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Sort keys of pairs, int64: higher goes first."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = bits.to(tl.int64) + (1 << 31)
    if FIRST > 0:
        favoured = (row + offset // SIDE < first_row + FIRST)[:, None] | (col < first_col + FIRST)[
            None, :
        ]
        key += tl.where(favoured, 1 << 32, 0).to(tl.int64)
    if DIAGONAL > 0:
        own = (row * SIDE + offset) // SIDE
        near = tl.abs(col[None, :] - own[:, None]) <= DIAGONAL // 2
        if FIRST > 0:
            near = near & (key < (1 << 32))
        key += tl.where(near, 1 << 32, 0).to(tl.int64)
    index = row.to(tl.int64)[:, None] * cols + col.to(tl.int64)[None, :]
    return (key << INDEX_BITS) + ((1 << INDEX_BITS) - 1 - index)


@triton.jit
def threshold_kernel(
    Q_MEANS, K_MEANS, ROWS, KEYS, BUDGETS, FIRSTS, BEST, THRESHOLDS,
    scaling, softcap, offset, heads, rows, cols, segments, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr,
    RB: tl.constexpr, CB: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COUNT: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The lowest key that is paid for, of each segment. Grid: (tiles of ``RB`` rows of blocks, or
    the segments of a head; batch * heads)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    Q_MEANS += head * rows * D
    K_MEANS += head // GROUP * cols * D
    ROWS += batch * rows * ROW_FACTS
    KEYS += batch * cols
    BEST += head * rows
    first_row = tl.load(FIRSTS + 2 * batch)
    first_col = tl.load(FIRSTS + 2 * batch + 1)
    inner = tl.arange(0, RB)
    if BY_ROW:
        begin, end = tl.program_id(0) * RB, tl.program_id(0) * RB + RB
        segment = begin + inner
    else:
        begin, end = 0, rows
        segment = tl.zeros([RB], tl.int32) + tl.program_id(0)
    left = tl.load(BUDGETS + batch * segments + segment, mask=segment < segments, other=-1)

    if LESS_BEST:
        for row_0 in range(begin, end, RB):
            row = row_0 + inner
            inside = row < rows
            q = load_rows(Q_MEANS, row, D, inside, D, DP)
            whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
            best = tl.full([RB], float("-inf"), tl.float32)
            for col_0 in range(0, cols, CB):
                col = col_0 + tl.arange(0, CB)
                logits = _logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED)
                n_keys, real = _is_real(KEYS, col, cols)
                seen = (col[None, :] >= seen_first[:, None]) & (col[None, :] < seen_stop[:, None])
                logits = tl.where(seen & real[None, :], logits, float("-inf"))
                best = tl.maximum(best, tl.max(logits, 1))
            tl.store(BEST + row, best, mask=inside)
        tl.debug_barrier()

    bucket = tl.arange(0, BUCKETS)[None, :]
    low = tl.zeros([RB], tl.int64)
    threshold = tl.full([RB], NOTHING, tl.int64)
    searching = left >= 0
    shift = 57
    while (shift >= 0) & (tl.max(searching.to(tl.int32), 0) > 0):
        tally = tl.zeros([RB, BUCKETS], tl.int64)
        for row_0 in range(begin, end, RB):
            row = row_0 + inner
            inside = row < rows
            q = load_rows(Q_MEANS, row, D, inside, D, DP)
            whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
            at = ROWS + row.to(tl.int64) * ROW_FACTS
            n_queries = tl.load(at + QUERIES, mask=inside, other=0)
            if not BY_ROW:
                padding = tl.load(at + PADDING, mask=inside, other=-1)
                inside = padding == segment
            best = tl.zeros([RB], tl.float32)
            if LESS_BEST:
                best = tl.load(BEST + row, mask=inside, other=0.0)
            for col_0 in range(0, cols, CB):
                col = col_0 + tl.arange(0, CB)
                scores = _logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED)
                scores = scores - best[:, None]
                n_keys, real = _is_real(KEYS, col, cols)
                whole = (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
                whole = whole & (inside[:, None] & real[None, :])
                key = _keys(
                    scores, row, col, cols, offset, first_row, first_col, SIDE, FIRST, DIAGONAL
                )
                place = (key - low[:, None]) >> shift
                cost = n_queries[:, None] * n_keys[None, :]
                if BY_COUNT:
                    cost = tl.full([RB, CB], 1, tl.int32)
                worth = tl.where(whole, cost.to(tl.int64) + (1 << COST_BITS), 0)
                for each in tl.static_range(BUCKETS):
                    part = tl.sum(tl.where(place == each, worth, 0), 1)
                    tally += tl.where(bucket == each, part[:, None], 0)
        if not BY_ROW:
            tally = tl.zeros([RB, BUCKETS], tl.int64) + tl.sum(tally, 0)[None, :]
        cost_here = tally & ((1 << COST_BITS) - 1)
        cost_from = tl.sum(cost_here, 1)[:, None] - tl.cumsum(cost_here, 1) + cost_here
        too_much = tl.max(tl.where(cost_from > left[:, None], bucket, -1), 1)
        chosen = bucket == too_much[:, None]
        count = tl.sum(tl.where(chosen, tally >> COST_BITS, 0), 1)
        spent = tl.sum(tl.where(chosen, cost_from - cost_here, 0), 1)
        bottom = low + (too_much.to(tl.int64) << shift)
        # No bucket costs too much: all are paid for. One pair left: it is the one that costs more.
        found = tl.where(too_much < 0, low, bottom + (tl.full([RB], 1, tl.int64) << shift))
        ends = searching & ((too_much < 0) | (count <= 1) | (shift == 0))
        threshold = tl.where(ends, found, threshold)
        searching = searching & (ends == 0)
        low = tl.where(searching, bottom, low)
        left = tl.where(searching, left - spent, left)
        shift -= BUCKET_BITS
    first_only = (inner == 0) | BY_ROW
    tl.store(THRESHOLDS + head * segments + segment, threshold, (segment < segments) & first_only)


@triton.jit
def open_kernel(
    Q_MEANS, K_MEANS, V_MEANS, ROWS, KEYS, FIRSTS, BEST, THRESHOLDS,
    OPEN, RESCUED, PEAK, MASS, WEIGHTED,
    scaling, softcap, offset, heads, rows, cols, words, segments, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    SIDE: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    BY_ROW: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, POOLED: tl.constexpr, RESCUE: tl.constexpr,
):  # fmt: skip
    """Bits of the pairs that are opened and, for ``POOLED``, the softmax over those that are not,
    one logit per pair. Grid: (tiles of ``RB`` rows of blocks, batch * heads)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    inside = row < rows
    Q_MEANS += head * rows * D
    K_MEANS += head // GROUP * cols * D
    V_MEANS += head // GROUP * cols * DV
    ROWS += batch * rows * ROW_FACTS
    KEYS += batch * cols
    first_row = tl.load(FIRSTS + 2 * batch)
    first_col = tl.load(FIRSTS + 2 * batch + 1)
    q = load_rows(Q_MEANS, row, D, inside, D, DP)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(ROWS, row, inside)
    at = ROWS + row.to(tl.int64) * ROW_FACTS
    segment = row
    if not BY_ROW:
        segment = tl.load(at + PADDING, mask=inside, other=0)
    threshold = tl.load(THRESHOLDS + head * segments + segment, mask=inside, other=NOTHING)
    best = tl.zeros([RB], tl.float32)
    if LESS_BEST:
        best = tl.load(BEST + head * rows + row, mask=inside, other=0.0)
    rescued = tl.full([RB], -1, tl.int32)
    if RESCUE:
        # A row of blocks in which a query would see nothing gets its best whole pair.
        top = tl.full([RB], float("-inf"), tl.float32)
        served = tl.load(at + STARVING, mask=inside, other=0) == 0
        for col_0 in range(0, cols, CB):
            col = col_0 + tl.arange(0, CB)
            logits = _logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED)
            n_keys, real = _is_real(KEYS, col, cols)
            whole = (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
            whole = whole & real[None, :]
            key = _keys(
                logits - best[:, None], row, col, cols, offset, first_row, first_col,
                SIDE, FIRST, DIAGONAL,
            )  # fmt: skip
            paid = whole & (key >= threshold[:, None])
            served = served | (tl.max(paid.to(tl.int32), 1) > 0)
            logits = tl.where(whole, logits, float("-inf"))
            here = tl.max(logits, 1)
            lowest = tl.min(tl.where(logits == here[:, None], col[None, :], cols), 1)
            rescued = tl.where(here > top, lowest, rescued)
            top = tl.maximum(top, here)
        rescued = tl.where(served, -1, rescued)
        tl.store(RESCUED + head * rows + row, rescued, mask=inside)

    peak = tl.full([RB], float("-inf"), tl.float32)
    mass = tl.zeros([RB], tl.float32)
    weighted = tl.zeros([RB, DVP], tl.float32)
    for col_0 in range(0, cols, CB):
        col = col_0 + tl.arange(0, CB)
        logits = _logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED)
        n_keys, real = _is_real(KEYS, col, cols)
        whole = (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
        whole = whole & real[None, :]
        seen = (col[None, :] >= seen_first[:, None]) & (col < seen_stop[:, None])
        key = _keys(
            logits - best[:, None], row, col, cols, offset, first_row, first_col,
            SIDE, FIRST, DIAGONAL,
        )  # fmt: skip
        paid = (key >= threshold[:, None]) | (col[None, :] == rescued[:, None])
        opened = seen & real[None, :] & (paid | (whole == 0))
        bits = tl.reshape(opened.to(tl.int32), [RB, CB // 32, 32])
        word = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        where = col_0 // 32 + tl.arange(0, CB // 32)
        to = OPEN + (head * rows + row)[:, None] * words + where[None, :]
        tl.store(to, word, mask=inside[:, None] & (where < words)[None, :])
        if POOLED:
            size = tl.math.log2(tl.maximum(n_keys, 1).to(tl.float32))
            logits = tl.where(whole & (opened == 0), logits * LOG2_E + size[None, :], float("-inf"))
            v = load_rows(V_MEANS, col, DV, col < cols, DV, DVP)
            peak, mass, weighted = softmax_step(logits, v, peak, mass, weighted, "ieee")
    if POOLED:
        to = head * rows + row
        tl.store(PEAK + to, peak, mask=inside)
        tl.store(MASS + to, mass, mask=inside)
        d = tl.arange(0, DVP)
        tl.store(
            WEIGHTED + to[:, None] * DV + d[None, :],
            weighted,
            mask=inside[:, None] & (d < DV)[None, :],
        )


def select(
    q_means: Tensor,
    k_means: Tensor,
    v_means: Tensor | None,
    tables: MaskTables,
    budgets: Tensor,
    settings: Settings,
) -> Plan:
    """Chooses blocks as `mra_kernels.selection.select_blocks` does.

    Args:
        q_means, k_means, v_means: From `pooled`; ``v_means`` for ``coarse="pooled"`` only.
        tables, budgets: Of the mask, see `RowCosts.budgets`.
    """
    (batch, heads, rows, width), (_, kv_heads, cols, _) = q_means.shape, k_means.shape
    value_width = width if v_means is None else v_means.shape[-1]
    segments, words = budgets.shape[1], -(-cols // 32)
    flat = (batch * heads, rows)
    best = q_means.new_empty(flat)
    thresholds = q_means.new_empty((batch * heads, segments), dtype=torch.int64)
    mask_step = int(tables.rows.shape[0] > 1)
    numbers = settings.scaling, settings.softcap or 1.0, settings.offset, heads, rows, cols
    shared = {
        "GROUP": heads // kv_heads,
        "D": width,
        "DP": tuning.padded(width),
        "SIDE": settings.side,
        "BY_ROW": settings.by_row,
        "LESS_BEST": settings.less_best,
        "CAPPED": settings.softcap is not None,
        "FIRST": settings.first_blocks,
        "DIAGONAL": settings.diagonal_blocks,
    }
    tile_rows = 16 if settings.by_row or rows <= 16 else 32
    n_tiles = -(-rows // tile_rows) if settings.by_row else 1 if tables.query_pooled is None else 2
    tuning.launch(
        threshold_kernel, (n_tiles, batch * heads),
        q_means, k_means, tables.rows, tables.keys_per_block, budgets, tables.first,
        best, thresholds, *numbers, segments, mask_step,
        RB=tile_rows, CB=64, BY_COUNT=settings.by_count, num_warps=8, **shared,
    )  # fmt: skip
    pooled, rescue = settings.coarse == "pooled", settings.coarse == "none"
    opened = q_means.new_empty((*flat, words), dtype=torch.int32)
    rescued = q_means.new_empty(flat, dtype=torch.int32) if rescue else None
    peak, mass = (q_means.new_empty(flat) if pooled else None for _ in range(2))
    weighted = q_means.new_empty((*flat, value_width)) if pooled else None
    tuning.launch(
        open_kernel, (-(-rows // 16), batch * heads),
        q_means, k_means, v_means if pooled else q_means, tables.rows, tables.keys_per_block,
        tables.first, best, thresholds, opened, rescued, peak, mass, weighted,
        *numbers, words, segments, mask_step,
        DV=value_width, DVP=tuning.padded(value_width), RB=16, CB=64,
        POOLED=pooled, RESCUE=rescue, num_warps=4, **shared,
    )  # fmt: skip
    return Plan(opened, rescued, peak, mass, weighted)
