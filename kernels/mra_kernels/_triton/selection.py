"""From block means to the plan of one call, without a matrix of scores.

`threshold` finds from which score on the budget pays for all pairs that are whole; the kernel here
opens those, and pairs that the mask cuts through, and attends over the rest at block means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.pairs import NOTHING, pair_logits, real_keys, sort_keys
from mra_kernels._triton.plan import Plan, Settings
from mra_kernels._triton.primitives import (
    LOG2_E,
    PADDING,
    ROW_FACTS,
    STARVING,
    block_row_facts,
    load_rows,
    run_of_rows,
    softmax_step,
)
from mra_kernels._triton.threshold import (
    CANDIDATES,
    FIRST_BITS,
    head_threshold_kernel,
    row_threshold_kernel,
)

_LARGEST_TILE = 1 << 13
"""Numbers in the means of keys that a program can hold at once."""


@triton.jit
def open_kernel(
    Q_MEANS, K_MEANS, V_MEANS, ROWS, KEYS, FIRSTS, BEST, THRESHOLDS,
    OPEN, RESCUED, PEAK, MASS, WEIGHTED,
    scaling, softcap, offset, heads, rows, cols, room, words, segments, mask_step,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    SIDE: tl.constexpr, QUERY_ROWS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    BY_ROW: tl.constexpr, LESS_BEST: tl.constexpr, CAPPED: tl.constexpr,
    FIRST: tl.constexpr, DIAGONAL: tl.constexpr, POOLED: tl.constexpr, RESCUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Bits of the pairs that are opened and, for ``POOLED``, the softmax over those that are not,
    one logit per pair. Grid: (tiles of ``RB`` rows of blocks, batch * heads)."""
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    inside = row < rows
    Q_MEANS += head * rows * D
    K_MEANS += head // GROUP * room * D
    V_MEANS += head // GROUP * room * DV
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
        begin, end = run_of_rows(whole_first, whole_stop, inside, cols, CB)
        for col_0 in range(begin, end, CB):
            col = col_0 + tl.arange(0, CB)
            logits = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
            n_keys, real = real_keys(KEYS, col, cols)
            whole = (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
            whole = whole & real[None, :]
            key = sort_keys(
                logits - best[:, None], row, col, cols, offset, first_row, first_col,
                SIDE, QUERY_ROWS, FIRST, DIAGONAL,
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
    OPEN += (head * rows + row)[:, None] * words + tl.arange(0, CB // 32)[None, :]
    begin, end = run_of_rows(seen_first, seen_stop, inside, cols, CB)
    for word_0 in range(0, words, CB // 32):
        word = word_0 + tl.arange(0, CB // 32)
        unseen = ((word * 32 < begin) | (word * 32 >= end)) & (word < words)
        there = inside[:, None] & unseen[None, :]
        tl.store(OPEN + word_0, tl.zeros([RB, CB // 32], tl.int32), mask=there)
    for col_0 in range(begin, end, CB):
        col = col_0 + tl.arange(0, CB)
        logits = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
        n_keys, real = real_keys(KEYS, col, cols)
        whole = (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
        whole = whole & real[None, :]
        seen = (col[None, :] >= seen_first[:, None]) & (col < seen_stop[:, None])
        key = sort_keys(
            logits - best[:, None], row, col, cols, offset, first_row, first_col,
            SIDE, QUERY_ROWS, FIRST, DIAGONAL,
        )  # fmt: skip
        paid = (key >= threshold[:, None]) | (col[None, :] == rescued[:, None])
        opened = seen & real[None, :] & (paid | (whole == 0))
        bits = tl.reshape(opened.to(tl.int32), [RB, CB // 32, 32])
        words_here = tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)
        there = inside[:, None] & (col_0 // 32 + tl.arange(0, CB // 32) < words)[None, :]
        tl.store(OPEN + col_0 // 32, words_here, mask=there)
        if POOLED:
            size = tl.math.log2(tl.maximum(n_keys, 1).to(tl.float32))
            logits = tl.where(whole & (opened == 0), logits * LOG2_E + size[None, :], float("-inf"))
            v = load_rows(V_MEANS, col, DV, col < cols, DV, DVP)
            peak, mass, weighted = softmax_step(logits, v, peak, mass, weighted, PRECISION)
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
    zeros: Tensor,
) -> Plan:
    """Chooses blocks as `mra_kernels.selection.select_blocks` does.

    Args:
        q_means, k_means, v_means: From `pooled`; ``v_means`` for ``coarse="pooled"`` only. Those of
            keys and values may be the first blocks of larger buffers, `KeyPyramid`'s.
        tables, budgets: Of the mask, see `RowCosts.budgets`.
        zeros: From `tally_space`, zeroed.
    """
    (batch, heads, rows, width), (_, kv_heads, cols, _) = q_means.shape, k_means.shape
    value_width = width if v_means is None else v_means.shape[-1]
    flat = batch * heads
    best = q_means.new_empty(flat, rows)
    thresholds = budgets.new_empty(flat, rows if settings.by_row else 2)
    numbers = settings.scaling, settings.softcap or 1.0, settings.offset, heads, rows, cols
    room = k_means.stride(1) // width
    mask_step = int(tables.rows.shape[0] > 1)
    inputs = q_means, k_means, tables.rows, tables.keys_per_block, budgets, tables.first
    shared = {
        "GROUP": heads // kv_heads,
        "D": width,
        "DP": tuning.padded(width),
        "SIDE": settings.side,
        "QUERY_ROWS": settings.query_rows,
        "LESS_BEST": settings.less_best,
        "CAPPED": settings.softcap is not None,
        "FIRST": settings.first_blocks,
        "DIAGONAL": settings.diagonal_blocks,
        "PRECISION": tuning.mean_precision(q_means.device),
        "RB": 16,
    }
    by_count, tiles, tile_cols = settings.by_count, -(-rows // 16), 64 if width <= 64 else 32
    if settings.by_row:
        one_tile = tuning.padded(cols) * tuning.padded(width) <= _LARGEST_TILE
        tuning.launch(
            row_threshold_kernel, (tiles, flat),
            *inputs, best, thresholds, *numbers, room, mask_step,
            CB=tuning.padded(cols) if one_tile else tile_cols, ONE_TILE=one_tile, BY_COUNT=by_count,
            num_warps=8, num_stages=2, **shared,
        )  # fmt: skip
    else:
        segments = _segments(tables)
        tallies = zeros[: flat * segments << FIRST_BITS]
        arrived, cursors = zeros[tallies.numel() :].split([flat, flat * segments])
        tuning.launch(
            head_threshold_kernel, (tiles, flat),
            *inputs, best, thresholds, tallies, arrived, cursors,
            budgets.new_empty(flat, 2 * CANDIDATES), *numbers, room, mask_step,
            CB=tile_cols, SEGMENTS=segments, FIRST_BITS=FIRST_BITS, CANDIDATES=CANDIDATES,
            BY_COUNT=by_count, num_warps=4, num_stages=2, **shared,
        )  # fmt: skip
    words = -(-cols // 32)
    pooled, rescue = settings.coarse == "pooled", settings.coarse == "none"
    opened = q_means.new_empty((flat, rows, words), dtype=torch.int32)
    rescued = q_means.new_empty((flat, rows), dtype=torch.int32) if rescue else None
    peak, mass = (q_means.new_empty(flat, rows) if pooled else None for _ in range(2))
    weighted = q_means.new_empty(flat, rows, value_width) if pooled else None
    tuning.launch(
        open_kernel, (tiles, flat),
        q_means, k_means, v_means if pooled else q_means, tables.rows, tables.keys_per_block,
        tables.first, best, thresholds, opened, rescued, peak, mass, weighted,
        *numbers, room, words, thresholds.shape[1], mask_step,
        DV=value_width, DVP=tuning.padded(value_width), CB=tile_cols,
        BY_ROW=settings.by_row, POOLED=pooled, RESCUE=rescue, num_warps=4, num_stages=2, **shared,
    )  # fmt: skip
    return Plan(opened, rescued, peak, mass, weighted)


def tally_space(flat: int, tables: MaskTables, settings: Settings) -> int:
    """How many zeros, int64, `select` needs for ``flat`` heads in all batch entries."""
    if settings.by_row:
        return 0
    segments = _segments(tables)
    return flat * ((segments << FIRST_BITS) + 1 + segments)


def _segments(tables: MaskTables) -> int:
    """A head's real rows, and those that are padding if there can be any."""
    return 1 if tables.query_pooled is None else 2
