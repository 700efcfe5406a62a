"""Attention over the opened blocks, entry by entry, and the coarse term, in one online softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.lists import (
    entries_of,
    entry_of_tokens,
    list_keys,
    load_tokens,
    tokens_of,
    visible_keys,
)
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.plan import Plan, Settings
from mra_kernels._triton.primitives import (
    LN_2,
    LOG2_E,
    ROW_FACTS,
    afresh,
    block_row_facts,
    load_rows,
    logits_of,
    merged,
    merged_mass,
    row_dots,
    run_of_rows,
    softmax_step,
    softmax_step_whole,
    store_rows,
)

CHUNK = 128
"""Key blocks listed at a time: bounds the list of a tile, whatever the length."""

FEW = 16
"""Queries of which each head has one tile: decoding."""

_PROGRAMS = 512
"""Programs to keep a GPU busy with few queries."""

COARSE = {"none": 0, "pooled": 1, "per_query": 2}
"""How kernels call the kinds of coarse terms."""


@triton.jit
def _list_step(
    q, Q, inside, K, V, entry, begin, stop, local, KEY_VALID, m, skn, svn, scaling, softcap,
    peak, mass, weighted,
    PART: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_tokens(K, entry, skn, m, PART, BN, D, DP, PLAIN)
    key = tokens_of(entry, PART, BN)
    at = K + key.to(tl.int64) * skn
    dots = row_dots(q, Q, inside, k, at, key < m, D, DP, PRECISION)
    v = load_tokens(V, entry, svn, m, PART, BN, DV, DVP, PLAIN)
    if FOLD and PLAIN:
        return softmax_step_whole(dots, scaling * LOG2_E, v, peak, mass, weighted, PRECISION)
    else:
        logits = logits_of(dots, scaling, softcap, CAPPED) * LOG2_E
        if not PLAIN:
            visible = visible_keys(entry, begin, stop, local, KEY_VALID, m, PART, BN)
            logits = tl.where(visible, logits, float("-inf"))
        return softmax_step(logits, v, peak, mass, weighted, PRECISION)


@triton.jit
def forward_kernel(
    Q, K, V, OUTPUT, LSE, TOTAL, OPEN, ROWS, KEYS, INTERVALS, KEY_VALID,
    K_MEANS, V_MEANS, PEAK, MASS, WEIGHTED, SINKS, LISTS, PARTS, ARRIVED,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    heads, n, m, rows, cols, room, words, mask_step, splits, scaling, softcap,
    GROUP: tl.constexpr, QUERY_ROWS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    COARSE: tl.constexpr, CAPPED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of ``BM`` queries, batch * heads, ``splits`` of the key blocks).

    With ``SPLIT``, the last program to finish a tile merges what all of them found; ``ARRIVED``
    must come zeroed.
    """
    # The last tiles of a causal mask have most to do: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    which = tl.program_id(1)
    slot = (which.to(tl.int64) * tl.num_programs(0) + tile) * splits
    LISTS += (slot + tl.program_id(2)) * CHUNK
    head = which % heads
    batch = (which // heads).to(tl.int64)
    flat = which.to(tl.int64)
    Q += batch * sqb + head.to(tl.int64) * sqh
    K += batch * skb + (head // GROUP).to(tl.int64) * skh
    V += batch * svb + (head // GROUP).to(tl.int64) * svh
    of_mask = batch * mask_step
    OPEN += flat * rows * words
    ROWS += of_mask * rows * ROW_FACTS
    KEYS += of_mask * cols
    INTERVALS += of_mask * n * 2
    if KEY_VALID is not None:
        KEY_VALID += of_mask * m
    query = tile * BM + tl.arange(0, BM)
    inside = query < n
    first_row = tile * BM // QUERY_ROWS
    TILE_ROWS: tl.constexpr = (BM + QUERY_ROWS - 1) // QUERY_ROWS
    local = query // QUERY_ROWS - first_row if TILE_ROWS > 1 else None
    begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
    stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)
    q = load_rows(Q, query, sqn, inside, D, DP)
    Q += query.to(tl.int64) * sqn
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM, DVP], tl.float32)

    PART: tl.constexpr = min(SIDE, BN)
    STEP: tl.constexpr = BN // PART
    parts = cols * (SIDE // PART)
    span = tl.cdiv(tl.cdiv(parts, CHUNK), splits) * CHUNK
    begin_part = tl.program_id(2) * span
    for part_0 in range(begin_part, tl.minimum(begin_part + span, parts), CHUNK):
        n_plain, n_listed = list_keys(
            LISTS, OPEN, ROWS, KEYS, first_row, part_0, rows, cols, words,
            SIDE, PART, TILE_ROWS, CHUNK, STEP,
        )  # fmt: skip
        # The next entry is read a step ahead, so that keys can be on their way.
        a, b, c, d = entries_of(LISTS, 0, n_listed, STEP)
        for at in tl.range(0, n_plain, STEP, num_stages=STAGES):
            here = entry_of_tokens(a, b, c, d, PART, BN)
            a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
            peak, mass, weighted = _list_step(
                q, Q, inside, K, V, here, begin, stop, local, KEY_VALID, m, skn, svn, scaling,
                softcap, peak, mass, weighted, PART, BN, D, DP, DV, DVP, CAPPED, True, FOLD,
                PRECISION,
            )  # fmt: skip
        for at in tl.range(n_plain, n_listed, STEP, num_stages=STAGES):
            here = entry_of_tokens(a, b, c, d, PART, BN)
            a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
            peak, mass, weighted = _list_step(
                q, Q, inside, K, V, here, begin, stop, local, KEY_VALID, m, skn, svn, scaling,
                softcap, peak, mass, weighted, PART, BN, D, DP, DV, DVP, CAPPED, False, FOLD,
                PRECISION,
            )  # fmt: skip

    query = afresh(tile, n) * BM + tl.arange(0, BM)
    inside = query < n
    if SPLIT:
        lane = tl.arange(0, BM)
        at = (slot + tl.program_id(2)) * BM + lane
        sums = PARTS + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * splits * BM * 2
        tl.store(PARTS + at * 2, peak)
        tl.store(PARTS + at * 2 + 1, mass)
        store_rows(sums, at, DV, weighted, lane < BM, DV, DVP)
        tl.debug_barrier()
        inside = inside & (tl.atomic_add(ARRIVED + slot // splits, 1) == splits - 1)
        peak = tl.full([BM], float("-inf"), tl.float32)
        mass = tl.zeros([BM], tl.float32)
        weighted = tl.zeros([BM, DVP], tl.float32)
        for split in range(0, splits):
            at = (slot + split) * BM + lane
            other = tl.load(PARTS + at * 2, mask=inside, other=float("-inf"))
            more = tl.load(PARTS + at * 2 + 1, mask=inside, other=0.0)
            coarse = load_rows(sums, at, DV, inside, DV, DVP)
            peak, mass, weighted = merged(peak, mass, weighted, other, more, coarse)
        begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
        stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)

    seeing = begin < stop
    to = flat * n + query
    lse = tl.where(seeing, (peak + tl.math.log2(mass)) * LN_2, float("-inf"))
    tl.store(LSE + to, lse, mask=inside)
    row = query // QUERY_ROWS
    if COARSE == 1:
        if TILE_ROWS == 1:
            at = flat * rows + first_row
            other, more = tl.load(PEAK + at), tl.load(MASS + at)
        else:
            at = flat * rows + row
            other = tl.load(PEAK + at, mask=inside, other=float("-inf"))
            more = tl.load(MASS + at, mask=inside, other=0.0)
        peak, mass, mine, theirs = merged_mass(peak, mass, other, more)
        weighted = weighted * mine[:, None]
        d = tl.arange(0, DVP)
        for each in tl.static_range(TILE_ROWS):  # one at a time, which takes few registers
            at = flat * rows + tl.minimum(first_row + each, rows - 1)
            coarse = tl.load(WEIGHTED + at * DV + d, mask=d < DV, other=0.0)
            share = theirs if TILE_ROWS == 1 else tl.where(row == first_row + each, theirs, 0.0)
            weighted += share[:, None] * coarse[None, :]
    if COARSE == 2:
        whole_first, whole_stop, _, _ = block_row_facts(ROWS, row, inside)
        K_MEANS += (batch * (heads // GROUP) + head // GROUP) * room * D
        V_MEANS += (batch * (heads // GROUP) + head // GROUP) * room * DV
        CB: tl.constexpr = 32 if DP * q.dtype.primitive_bitwidth <= 2048 else 16
        begin_col, end_col = run_of_rows(whole_first, whole_stop, inside, cols, CB)
        for col_0 in tl.range(begin_col, end_col, CB, num_stages=1):
            col = col_0 + tl.arange(0, CB)
            word = tl.load(OPEN + row.to(tl.int64) * words + col_0 // 32, mask=inside, other=0)
            n_keys = tl.load(KEYS + col, mask=col < cols, other=0)
            left = ((word[:, None] >> (col % 32)[None, :]) & 1) == 0
            left = left & (col[None, :] >= whole_first[:, None]) & (col < whole_stop[:, None])
            left = left & (n_keys > 0)[None, :]
            k_mean = load_rows(K_MEANS, col, D, col < cols, D, DP).to(q.dtype)
            v_mean = load_rows(V_MEANS, col, DV, col < cols, DV, DVP).to(q.dtype)
            starts = K_MEANS + col.to(tl.int64) * D
            means = row_dots(q, Q, inside, k_mean, starts, col < cols, D, DP, PRECISION)
            size = tl.math.log2(tl.maximum(n_keys, 1).to(tl.float32))
            pooled = logits_of(means, scaling, softcap, CAPPED) * LOG2_E + size[None, :]
            pooled = tl.where(left, pooled, float("-inf"))
            peak, mass, weighted = softmax_step(pooled, v_mean, peak, mass, weighted, PRECISION)
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2_E
        higher = tl.maximum(peak, sink)
        decay = tl.math.exp2(peak - higher)
        mass = mass * decay + tl.math.exp2(sink - higher)
        weighted = weighted * decay[:, None]
        peak = higher
    seeing = seeing & (mass > 0)
    total = tl.where(seeing, peak + tl.math.log2(mass), float("-inf"))
    tl.store(TOTAL + to, total, mask=inside)
    result = tl.where(seeing[:, None], weighted / tl.where(mass > 0, mass, 1.0)[:, None], 0.0)
    OUTPUT += batch * sob + head.to(tl.int64) * soh
    store_rows(OUTPUT, query, son, result, inside, DV, DVP)


class Attended(NamedTuple):
    """Attributes:
    output: ``[B, H, N, Dv]``, dtype of the values; 0 for queries that see nothing.
    lse: Log-sum-exp of the exact logits, float32 ``[B, H, N]``; -inf where there are none.
    total: The same of all logits, coarse and sinks too, in base 2.
    """

    output: Tensor
    lse: Tensor
    total: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: MaskTables,
    plan: Plan,
    k_means: Tensor | None,
    v_means: Tensor | None,
    sinks: Tensor | None,
    settings: Settings,
    zeros: Tensor,
) -> Attended:
    """Softmax over what ``plan`` opened and its coarse term.

    Args:
        query, key, value: ``[B, H, N, D]``, ``[B, Hkv, M, D]``, ``[B, Hkv, M, Dv]``; features
            adjacent.
        k_means, v_means: From `pooled`, for ``coarse="per_query"`` only.
        sinks: ``[H]``.
        zeros: ``[B * H]``, zeroed, for few queries: their keys are split among programs.
    """
    (batch, heads, n, width), (_, kv_heads, m, value_width) = query.shape, value.shape
    output = value.new_empty(batch, heads, n, value_width)
    lse = query.new_empty((batch, heads, n), dtype=torch.float32)
    total = torch.empty_like(lse)
    cut = tuning.tiles("forward", query, value, settings.query_rows)
    few = n <= FEW
    tile_rows, most = (FEW, CHUNK // 4) if few else (cut.rows_for(settings.query_rows), CHUNK)
    rows, words = plan.opened.shape[1:]
    cols = tables.keys_per_block.shape[1]
    step = cut.keys_for(settings.side)
    listed = cols * max(1, settings.side // step)
    tiles, chunk = -(-n // tile_rows), min(most, tuning.padded(listed))
    splits = max(1, min(-(-listed // chunk), _PROGRAMS // (batch * heads))) if few else 1
    slots = batch * heads * tiles * splits
    lists = query.new_empty((slots, chunk), dtype=torch.int32)
    parts = lse.new_empty(slots * tile_rows * (value_width + 2)) if splits > 1 else None
    room = cols if k_means is None else k_means.stride(1) // width
    tuning.launch(
        forward_kernel, (tiles, batch * heads, splits),
        query, key, value, output, lse, total, plan.opened, tables.rows, tables.keys_per_block,
        tables.intervals, tables.key_valid, k_means, v_means,
        plan.peak, plan.mass, plan.weighted, sinks, lists, parts, zeros,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        heads, n, m, rows, cols, room, words, int(tables.rows.shape[0] > 1), splits,
        settings.scaling, settings.softcap or 1.0,
        GROUP=heads // kv_heads, QUERY_ROWS=settings.query_rows, SIDE=settings.side,
        D=width, DP=tuning.padded(width), DV=value_width, DVP=tuning.padded(value_width),
        BM=tile_rows, BN=step, CHUNK=chunk,
        COARSE=COARSE[settings.coarse], CAPPED=settings.softcap is not None,
        FOLD=settings.softcap is None and settings.scaling > 0, PRECISION=tuning.precision(),
        STAGES=cut.stages, SPLIT=splits > 1, **cut.options,
    )  # fmt: skip
    return Attended(output, lse, total)
