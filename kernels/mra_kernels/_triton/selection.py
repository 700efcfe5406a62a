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
from mra_kernels._triton.plan import Plan, Settings
from mra_kernels._triton.primitives import (
    PADDING,
    ROW_FACTS,
    STARVING,
    block_row_facts,
    load_rows,
    run_of_rows,
)
from mra_kernels._triton.short import choose_kernel
from mra_kernels._triton.threshold import (
    CANDIDATES,
    head_threshold_kernel,
    row_threshold_kernel,
)

LARGEST_TILE = 1 << 16
"""Pairs that a program can hold at once, times the width of heads."""


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
            whole = pairs_between(col, whole_first, whole_stop, real)
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
    OPEN += (head * rows + row)[:, None] * words
    begin, end = run_of_rows(seen_first, seen_stop, inside, cols, CB)
    for word_0 in range(0, words, CB // 32):
        word = word_0 + tl.arange(0, CB // 32)
        unseen = ((word * 32 < begin) | (word * 32 >= end)) & (word < words)
        there = inside[:, None] & unseen[None, :]
        tl.store(OPEN + word[None, :], tl.zeros([RB, CB // 32], tl.int32), mask=there)
    for col_0 in range(begin, end, CB):
        col = col_0 + tl.arange(0, CB)
        logits = pair_logits(q, K_MEANS, col, cols, scaling, softcap, D, DP, CAPPED, PRECISION)
        n_keys, real = real_keys(KEYS, col, cols)
        whole = pairs_between(col, whole_first, whole_stop, real)
        seen = pairs_between(col, seen_first, seen_stop, real)
        key = sort_keys(
            logits - best[:, None], row, col, cols, offset, first_row, first_col,
            SIDE, QUERY_ROWS, FIRST, DIAGONAL,
        )  # fmt: skip
        paid = (key >= threshold[:, None]) | (col[None, :] == rescued[:, None])
        opened = seen & (paid | (whole == 0))
        store_opened(OPEN, opened, col_0, words, inside, RB, CB)
        if POOLED:
            peak, mass, weighted = coarse_step(
                logits, whole & (opened == 0), n_keys, V_MEANS, col, cols, peak, mass, weighted,
                DV, DVP, PRECISION,
            )  # fmt: skip
    if POOLED:
        store_coarse(PEAK, MASS, WEIGHTED, head * rows + row, inside, peak, mass, weighted, DV, DVP)


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
    flat, words = batch * heads, -(-cols // 32)
    pooled, rescue = settings.coarse == "pooled", settings.coarse == "none"
    peak, mass = (q_means.new_empty(flat, rows) if pooled else None for _ in range(2))
    plan = Plan(
        q_means.new_empty((flat, rows, words), dtype=torch.int32),
        q_means.new_empty((flat, rows), dtype=torch.int32) if rescue else None,
        peak,
        mass,
        q_means.new_empty(flat, rows, value_width) if pooled else None,
    )
    values = v_means if pooled else q_means
    numbers = settings.scaling, settings.softcap or 1.0, settings.offset, heads, rows, cols
    room = k_means.stride(1) // width
    mask_step = int(tables.rows.shape[0] > 1)
    inputs = tables.rows, tables.keys_per_block, budgets, tables.first
    by_count = {"BY_COUNT": settings.by_count}
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
        "num_stages": 2,
    }
    opening = {
        "DV": value_width,
        "DVP": tuning.padded(value_width),
        "BY_ROW": settings.by_row,
        "POOLED": pooled,
        "RESCUE": rescue,
    }
    tile = one_tile(rows, cols, max(width, value_width), settings.by_row)
    if tile is not None:
        tuning.launch(
            choose_kernel, (-(-rows // tile[0]), flat),
            q_means, k_means, values, *inputs, *plan, *numbers, room, words, mask_step,
            RB=tile[0], CB=tile[1], SEGMENTS=_segments(tables),
            num_warps=4,
            **by_count, **opening, **shared,
        )  # fmt: skip
        return plan
    best = q_means.new_empty(flat, rows)
    thresholds = budgets.new_empty(flat, rows if settings.by_row else 2)
    grid, shared["RB"], shared["CB"] = (-(-rows // 16), flat), 16, 64 if width <= 64 else 32
    if settings.by_row:
        tuning.launch(
            row_threshold_kernel, grid,
            q_means, k_means, *inputs, best, thresholds, *numbers, room, mask_step,
            num_warps=8, **by_count, **shared,
        )  # fmt: skip
    else:
        segments = _segments(tables)
        bits = first_bits(rows * cols)
        tallies = zeros[: flat * segments << bits]
        arrived, cursors = zeros[tallies.numel() :].split([flat, flat * segments])
        tuning.launch(
            head_threshold_kernel, grid,
            q_means, k_means, *inputs, best, thresholds, tallies, arrived, cursors,
            budgets.new_empty(flat, 2 * CANDIDATES), *numbers, room, mask_step,
            SEGMENTS=segments, FIRST_BITS=bits, CANDIDATES=CANDIDATES,
            num_warps=4, **by_count, **shared,
        )  # fmt: skip
    tuning.launch(
        open_kernel, grid,
        q_means, k_means, values, tables.rows, tables.keys_per_block, tables.first, best,
        thresholds, *plan, *numbers, room, words, thresholds.shape[1], mask_step,
        num_warps=4, **opening, **shared,
    )  # fmt: skip
    return plan


def one_tile(rows: int, cols: int, width: int, by_row: bool) -> tuple[int, int] | None:
    """Rows and columns of a tile that holds all pairs that compete for a budget, if one can."""
    tile_rows, tile_cols = 16 if by_row or rows <= 16 else 32, tuning.padded(cols)
    fits = tile_rows * tile_cols * tuning.padded(width) <= LARGEST_TILE
    return (tile_rows, tile_cols) if fits and (by_row or rows <= tile_rows) else None


def tally_space(flat: int, tables: MaskTables, width: int, settings: Settings) -> int:
    """How many zeros, int64, `select` needs for ``flat`` heads in all batch entries; ``width``: the
    wider of keys and values."""
    rows, cols = tables.rows.shape[1], tables.keys_per_block.shape[1]
    if settings.by_row or one_tile(rows, cols, width, settings.by_row) is not None:
        return 0
    segments = _segments(tables)
    return flat * ((segments << first_bits(rows * cols)) + 1 + segments)


def first_bits(pairs: int) -> int:
    """Leading bits of keys that are tallied by all programs together: so many that few pairs share
    those of the one sought, an even number to compile few kernels. The rest goes by three bits a
    pass."""
    return min(max(12, ((pairs - 1).bit_length() + 1) // 2 * 2 - 2), 18)


def _segments(tables: MaskTables) -> int:
    """A head's real rows, and those that are padding if there can be any."""
    return 1 if tables.query_pooled is None else 2
