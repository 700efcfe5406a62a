"""Gradients of queries: those over the opened blocks, to which the coarse term's are added."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.backward_coarse import coarse_tile
from mra_kernels._triton.lists import (
    entries_of,
    entry_of_tokens,
    list_keys,
    load_tokens,
    tokens_of,
    visible_keys,
)
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
