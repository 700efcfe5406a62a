"""Gradients over the opened blocks, to which those of the coarse term are added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.backward_coarse import (
    coarse_tile,
    column_gradients,
    prepare,
    row_gradients,
)
from mra_kernels._triton.forward import CHUNK, COARSE
from mra_kernels._triton.lists import (
    WHO,
    entries_of,
    entry_of_tokens,
    list_keys,
    list_queries,
    load_tokens,
    tokens_of,
    visible_keys,
)
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.plan import Settings
from mra_kernels._triton.primitives import (
    LOG2_E,
    ROW_FACTS,
    afresh,
    block_row_facts,
    cap_slope,
    load_norm,
    load_rows,
    logits_of,
    row_dots,
    run_of_rows,
    store_rows,
)


@triton.jit
def _query_step(
    q, grad, norm, delta, Q, GRAD, inside, K, V, entry, begin, stop, local, KEY_VALID, m, skn, svn,
    scaling, softcap, dq,
    PART: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = load_tokens(K, entry, skn, m, PART, BN, D, DP, PLAIN)
    v = load_tokens(V, entry, svn, m, PART, BN, DV, DVP, PLAIN)
    key = tokens_of(entry, PART, BN)
    at = key.to(tl.int64)
    dots = row_dots(q, Q, inside, k, K + at * skn, key < m, D, DP, PRECISION)
    logits = logits_of(dots, scaling, softcap, CAPPED)
    weights = tl.math.exp2(logits * LOG2_E - norm[:, None])
    if not PLAIN:
        visible = visible_keys(entry, begin, stop, local, KEY_VALID, m, PART, BN)
        weights = tl.where(visible, weights, 0.0)
    dots = row_dots(grad, GRAD, inside, v, V + at * svn, key < m, DV, DVP, PRECISION)
    ddots = weights * (dots - delta[:, None])
    if CAPPED:
        ddots = ddots * cap_slope(logits, softcap)
    return tl.dot(ddots.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def backward_query_kernel(
    Q, K, V, GRAD, TOTAL, DELTA, DQ, OPEN, ROWS, KEYS, INTERVALS, KEY_VALID, QUERY_POOLED,
    COARSE_DQ, SHARE, COARSE_DELTA, K_MEANS, V_MEANS, LISTS,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdb, sdh, sdn,
    heads, n, m, rows, cols, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, QUERY_ROWS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    COARSE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of queries. Grid: (tiles of ``BM`` queries, batch * heads).

    ``DELTA`` is what exact logits are pulled back by, `gradients`' ``pull``; ``COARSE_DELTA`` the
    same of means.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    flat = tl.program_id(1).to(tl.int64)
    LISTS += (flat * tl.num_programs(0) + tile) * CHUNK
    batch, head = flat // heads, flat % heads
    of_mask = batch * mask_step
    K += batch * skb + head // GROUP * skh
    V += batch * svb + head // GROUP * svh
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
    Q += batch * sqb + head * sqh
    GRAD += batch * sgb + head * sgh
    q = load_rows(Q, query, sqn, inside, D, DP)
    grad = load_rows(GRAD, query, sgn, inside, DV, DVP)
    Q += query.to(tl.int64) * sqn
    GRAD += query.to(tl.int64) * sgn
    norm = load_norm(TOTAL, flat * n + query, inside)
    delta = tl.load(DELTA + flat * n + query, mask=inside, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    PART: tl.constexpr = min(SIDE, BN)
    STEP: tl.constexpr = BN // PART
    for part_0 in range(0, cols * (SIDE // PART), CHUNK):
        n_plain, n_listed = list_keys(
            LISTS, OPEN, ROWS, KEYS, first_row, part_0, rows, cols, words,
            SIDE, PART, TILE_ROWS, CHUNK, STEP,
        )  # fmt: skip
        a, b, c, d = entries_of(LISTS, 0, n_listed, STEP)
        for at in tl.range(0, n_plain, STEP, num_stages=STAGES):
            here = entry_of_tokens(a, b, c, d, PART, BN)
            a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
            dq = _query_step(
                q, grad, norm, delta, Q, GRAD, inside, K, V, here, begin, stop, local, KEY_VALID,
                m, skn, svn, scaling, softcap, dq, PART, BN, D, DP, DV, DVP, CAPPED, True,
                PRECISION,
            )  # fmt: skip
        for at in tl.range(n_plain, n_listed, STEP, num_stages=STAGES):
            here = entry_of_tokens(a, b, c, d, PART, BN)
            a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
            dq = _query_step(
                q, grad, norm, delta, Q, GRAD, inside, K, V, here, begin, stop, local, KEY_VALID,
                m, skn, svn, scaling, softcap, dq, PART, BN, D, DP, DV, DVP, CAPPED, False,
                PRECISION,
            )  # fmt: skip
    query = afresh(tile, n) * BM + tl.arange(0, BM)
    inside = query < n
    if COARSE == 2:
        whole_first, whole_stop, _, _ = block_row_facts(ROWS, query // QUERY_ROWS, inside)
        delta = tl.load(COARSE_DELTA + flat * n + query, mask=inside, other=0.0)
        K_MEANS += flat // GROUP * cols * D
        V_MEANS += flat // GROUP * cols * DV
        CB: tl.constexpr = 16
        begin_col, end_col = run_of_rows(whole_first, whole_stop, inside, cols, CB)
        for col_0 in tl.range(begin_col, end_col, CB, num_stages=2):
            col = col_0 + tl.arange(0, CB)
            k_mean = load_rows(K_MEANS, col, D, col < cols, D, DP).to(q.dtype)
            v_mean = load_rows(V_MEANS, col, DV, col < cols, DV, DVP).to(q.dtype)
            _weights, ddots = coarse_tile(
                q, Q, grad, GRAD, norm, delta, query, n, k_mean, K_MEANS, v_mean, V_MEANS, col,
                OPEN, ROWS, KEYS, rows, cols, words, scaling, softcap, D, DP, DV, DVP,
                QUERY_ROWS, CAPPED, PRECISION,
            )  # fmt: skip
            dq = tl.dot(ddots.to(q.dtype), k_mean, dq, input_precision=PRECISION)
    dq = dq * scaling
    if COARSE == 1:
        row = query // QUERY_ROWS
        share = tl.load(SHARE + flat * rows + row, mask=inside, other=0.0)
        if QUERY_POOLED is not None:
            counted = tl.load(QUERY_POOLED + of_mask * n + query, mask=inside, other=0)
            share = tl.where(counted != 0, share, 0.0)
        dq += load_rows(COARSE_DQ + flat * rows * D, row, D, inside, D, DP) * share[:, None]
    store_rows(DQ + batch * sdb + head * sdh, query, sdn, dq, inside, D, DP)


@triton.jit
def _key_step(
    k, v, K, V, there, Q, GRAD, NORM, DELTA, INTERVALS, entry, key, local, n, sqn, sgn,
    scaling, softcap, dk, dv,
    PART: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
    TIGHT: tl.constexpr,
):  # fmt: skip
    q = load_tokens(Q, entry, sqn, n, PART, BM, D, DP, PLAIN, TIGHT)
    grad = load_tokens(GRAD, entry, sgn, n, PART, BM, DV, DVP, PLAIN, TIGHT)
    query = tokens_of(entry, PART, BM)
    inside = query < n
    norm = load_norm(NORM, query, inside)
    delta = tl.load(DELTA + query, mask=inside, other=0.0)
    at = query.to(tl.int64)
    dots = row_dots(k, K, there, q, Q + at * sqn, inside, D, DP, PRECISION)
    slopes = row_dots(v, V, there, grad, GRAD + at * sgn, inside, DV, DVP, PRECISION)
    logits = logits_of(dots, scaling, softcap, CAPPED)
    weights = tl.math.exp2(logits * LOG2_E - norm[None, :])
    if not PLAIN:
        begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
        stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)
        visible = (key[:, None] >= begin[None, :]) & (key[:, None] < stop[None, :])
        if PART == BM:
            visible = visible & (((entry >> (local + WHO)) & 1) == 1)[:, None]
        else:
            visible = visible & (((entry[None, :] >> (local + WHO)[:, None]) & 1) == 1)
        weights = tl.where(visible, weights, 0.0)
    if q.dtype == tl.float32:  # loaded only now, for want of registers
        q = load_tokens(Q, entry, sqn, n, PART, BM, D, DP, PLAIN)
        grad = load_tokens(GRAD, entry, sgn, n, PART, BM, DV, DVP, PLAIN)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ddots = weights * (slopes - delta[None, :])
    if CAPPED:
        ddots = ddots * cap_slope(logits, softcap)
    dk = tl.dot(ddots.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def backward_key_kernel(
    Q, K, V, GRAD, TOTAL, DELTA, DK, DV_, OPEN, ROWS, KEYS, INTERVALS, KEY_VALID,
    COARSE_DK, COARSE_DV, LISTS,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sgb, sgh, sgn, sdb, sdh, sdn, seb, seh, sen,
    kv_heads, n, m, rows, cols, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, QUERY_ROWS: tl.constexpr, SIDE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    COARSE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. Grid: (tiles of ``BN`` keys, batch * key heads)."""
    tile = tl.program_id(0)
    kv_flat = tl.program_id(1).to(tl.int64)
    LISTS += (kv_flat * tl.num_programs(0) + tile) * CHUNK
    batch, kv_head = kv_flat // kv_heads, kv_flat % kv_heads
    of_mask = batch * mask_step
    ROWS += of_mask * rows * ROW_FACTS
    KEYS += of_mask * cols
    INTERVALS += of_mask * n * 2
    key = tile * BN + tl.arange(0, BN)
    real = key < m
    if KEY_VALID is not None:
        real = tl.load(KEY_VALID + of_mask * m + key, mask=real, other=0) != 0
    first_col = tile * BN // SIDE
    local = key // SIDE - first_col
    # Keys that are padding stand outside every interval.
    seen = tl.where(real, key, -1)
    there = key < m
    K += batch * skb + kv_head * skh
    V += batch * svb + kv_head * svh
    k = load_rows(K, key, skn, there, D, DP)
    v = load_rows(V, key, svn, there, DV, DVP)
    K += key.to(tl.int64) * skn
    V += key.to(tl.int64) * svn
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DVP], tl.float32)
    PART: tl.constexpr = BM if BM < QUERY_ROWS else QUERY_ROWS
    STEP: tl.constexpr = BM // PART
    for each in range(0, GROUP):
        head = kv_head * GROUP + each
        flat = kv_flat * GROUP + each
        q_base = Q + batch * sqb + head * sqh
        grad_base = GRAD + batch * sgb + head * sgh
        for part_0 in range(0, tl.cdiv(n, PART), CHUNK):
            n_plain, n_listed = list_queries(
                LISTS, OPEN + flat * rows * words, ROWS, KEYS, first_col, part_0, cols, words, n,
                QUERY_ROWS, PART, SIDE, (BN + SIDE - 1) // SIDE, CHUNK, STEP,
            )  # fmt: skip
            a, b, c, d = entries_of(LISTS, 0, n_listed, STEP)
            for at in tl.range(0, n_plain, STEP, num_stages=STAGES):
                here = entry_of_tokens(a, b, c, d, PART, BM)
                a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
                dk, dv = _key_step(
                    k, v, K, V, there, q_base, grad_base, TOTAL + flat * n, DELTA + flat * n,
                    INTERVALS, here, seen, local, n, sqn, sgn, scaling, softcap, dk, dv,
                    PART, BM, D, DP, DV, DVP, CAPPED, True, PRECISION, TIGHT,
                )  # fmt: skip
            for at in tl.range(n_plain, n_listed, STEP, num_stages=STAGES):
                here = entry_of_tokens(a, b, c, d, PART, BM)
                a, b, c, d = entries_of(LISTS, at + STEP, n_listed, STEP)
                dk, dv = _key_step(
                    k, v, K, V, there, q_base, grad_base, TOTAL + flat * n, DELTA + flat * n,
                    INTERVALS, here, seen, local, n, sqn, sgn, scaling, softcap, dk, dv,
                    PART, BM, D, DP, DV, DVP, CAPPED, False, PRECISION, TIGHT,
                )  # fmt: skip
    key = afresh(tile, m) * BN + tl.arange(0, BN)
    there = key < m
    dk = dk * scaling
    if COARSE != 0:
        real = there
        if KEY_VALID is not None:
            real = tl.load(KEY_VALID + of_mask * m + key, mask=there, other=0) != 0
        col = key // SIDE
        share = tl.load(KEYS + col, mask=there, other=1).to(tl.float32)
        share = tl.where(real, 1 / tl.maximum(share, 1.0), 0.0)
        dk += load_rows(COARSE_DK + kv_flat * cols * D, col, D, there, D, DP) * share[:, None]
        dv += load_rows(COARSE_DV + kv_flat * cols * DV, col, DV, there, DV, DVP) * share[:, None]
    store_rows(DK + batch * sdb + kv_head * sdh, key, sdn, dk, there, D, DP)
    store_rows(DV_ + batch * seb + kv_head * seh, key, sen, dv, there, DV, DVP)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    lse_ratio: Tensor | None,
    grad: Tensor,
    peak: Tensor | None,
    means: tuple[Tensor, Tensor, Tensor] | None,
    opened: Tensor,
    tables: MaskTables,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, and ``grad . output`` float32 ``[B, H, N]``.

    Args:
        query, key, value: As in `attend`.
        output, total: What it gave.
        lse_ratio: Gradient of its lse times ``exp(total - lse)``, float32 ``[B, H, N]``; None: 0.
        grad: Gradient of the output, features adjacent.
        peak: Of the `Plan`, for ``coarse="pooled"``.
        means: Of queries, keys and values, unless ``coarse="none"``.
        opened: Bits of the `Plan`.
    """
    (batch, heads, n, width), (kv_heads, m, value_width) = query.shape, value.shape[1:]
    rows, words = opened.shape[1:]
    cols = tables.keys_per_block.shape[1]
    delta, block_grad, block_delta, share = prepare(
        output, grad, total, peak, tables, settings.query_rows
    )
    coarse_dq = coarse_dk = coarse_dv = None
    if means is not None:
        of_rows = query, grad, total, delta
        if peak is not None:
            assert block_grad is not None and block_delta is not None
            of_rows = means[0], block_grad, peak, block_delta
            coarse_dq = row_gradients(*of_rows, means[1], means[2], opened, tables, settings)
        coarse_dk, coarse_dv = column_gradients(
            *of_rows, means[1], means[2], opened, tables, settings
        )
    # In weights of the whole softmax, lse pulls at exact logits by this much more.
    pull = delta if lse_ratio is None else delta - lse_ratio
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    counts = n, m, rows, cols, words, int(tables.rows.shape[0] > 1)
    numbers = settings.scaling, settings.softcap or 1.0
    strides = [stride for x in (query, key, value, grad) for stride in x.stride()[:3]]
    shared = {
        "GROUP": heads // kv_heads,
        "QUERY_ROWS": settings.query_rows,
        "SIDE": settings.side,
        "D": width,
        "DP": tuning.padded(width),
        "DV": value_width,
        "DVP": tuning.padded(value_width),
        "COARSE": COARSE[settings.coarse],
        "CAPPED": settings.softcap is not None,
        "PRECISION": tuning.precision(),
    }

    def cut(kernel: str, listed: int) -> tuple[int, dict[str, int]]:
        """Tiles along the grid, and settings; ``listed`` tokens can be on a list."""
        tiles = tuning.tiles(kernel, query, value, settings.query_rows)
        bm, bn = tiles.rows_for(settings.query_rows), tiles.keys_for(settings.side)
        length, tile, part = (n, bm, min(bn, settings.side))
        if kernel == "backward_key":
            length, tile, part = (m, bn, min(bm, settings.query_rows))
        chunk = min(CHUNK, tuning.padded(-(-listed // part)))
        shapes = {"BM": bm, "BN": bn, "CHUNK": chunk, "STAGES": tiles.stages, **tiles.options}
        if kernel == "backward_key":
            shapes["TIGHT"] = tiles.tight
        return -(-length // tile), shapes

    tiles, shapes = cut("backward_query", m)
    lists = opened.new_empty((batch * heads, tiles, shapes["CHUNK"]))
    tuning.launch(
        backward_query_kernel, (tiles, batch * heads),
        query, key, value, grad, total, pull, dq, opened, tables.rows, tables.keys_per_block,
        tables.intervals, tables.key_valid, tables.query_pooled, coarse_dq, share,
        *((delta, means[1], means[2]) if means is not None and peak is None else [None] * 3), lists,
        *strides, *dq.stride()[:3], heads, *counts, *numbers, **shared, **shapes,
    )  # fmt: skip
    tiles, shapes = cut("backward_key", n)
    lists = opened.new_empty((batch * kv_heads, tiles, shapes["CHUNK"]))
    tuning.launch(
        backward_key_kernel, (tiles, batch * kv_heads),
        query, key, value, grad, total, pull, dk, dv, opened, tables.rows, tables.keys_per_block,
        tables.intervals, tables.key_valid, coarse_dk, coarse_dv, lists,
        *strides, *dk.stride()[:3], *dv.stride()[:3], kv_heads, *counts, *numbers,
        **shared, **shapes,
    )  # fmt: skip
    return dq, dk, dv, delta
