"""Gradients of keys and values: those over the opened blocks, to which the coarse term's are
added."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.lists import (
    WHO,
    entries_of,
    entry_of_tokens,
    list_queries,
    load_tokens,
    tokens_of,
)
from mra_kernels._triton.primitives import (
    LOG2_E,
    ROW_FACTS,
    afresh,
    cap_slope,
    load_norm,
    load_rows,
    logits_of,
    row_dots,
    store_rows,
)


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
        q = load_tokens(Q, entry, sqn, n, PART, BM, D, DP, PLAIN, TIGHT)
        grad = load_tokens(GRAD, entry, sgn, n, PART, BM, DV, DVP, PLAIN, TIGHT)
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
