"""Attention over opened keys, one by one, and over the others at the mean query of their block."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.keys_estimate import are_real
from mra_kernels._triton.primitives import (
    LN_2,
    LOG2_E,
    ROW_FACTS,
    block_row_facts,
    load_rows,
    logits_of,
    merged,
    run_of_rows,
    softmax_step,
    store_rows,
)


@triton.jit
def tail_kernel(
    MEANS, K, V, OPEN, ROWS, KEY_VALID, PEAK, MASS, WEIGHTED, MEAN_KEYS,
    skb, skh, skn, svb, svh, svn, heads, m, blocks, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    RB: tl.constexpr, BN: tl.constexpr, TILTED: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax over the whole keys that were not opened, at mean queries; for ``TILTED``, the mean
    of those keys, too. Grid: (tiles of ``RB`` blocks, batch * heads)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    flat = tl.program_id(1).to(tl.int64)
    head, batch = flat % heads, flat // heads
    K += batch * skb + head // GROUP * skh
    V += batch * svb + head // GROUP * svh
    of_mask = batch * mask_step
    if KEY_VALID is not None:
        KEY_VALID += of_mask * m
    block = tile * RB + tl.arange(0, RB)
    there = block < blocks
    whole_first, whole_stop, _first, _stop = block_row_facts(
        ROWS + of_mask * blocks * ROW_FACTS, block, there
    )
    mean = load_rows(MEANS + flat * blocks * D, block, D, there, D, DP)
    # Mean queries, and weights of keys, have more digits than keys: in two parts they keep them.
    q = mean.to(K.dtype.element_ty)
    less = (mean - q.to(tl.float32)).to(K.dtype.element_ty)
    peak = tl.full([RB], float("-inf"), tl.float32)
    mass = tl.zeros([RB], tl.float32)
    weighted = tl.zeros([RB, DVP], tl.float32)
    keys = tl.zeros([RB, DP], tl.float32)
    OPEN += (flat * blocks + block)[:, None] * words + tl.arange(0, BN // 32)[None, :]
    first, last = run_of_rows(whole_first, whole_stop, there, m, BN)
    for key_0 in tl.range(first, last, BN, num_stages=STAGES):
        key = key_0 + tl.arange(0, BN)
        k = load_rows(K, key, skn, key < m, D, DP)
        v = load_rows(V, key, svn, key < m, DV, DVP)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if K.dtype.element_ty != tl.float32:
            dots = tl.dot(less, tl.trans(k), dots)
        logits = logits_of(dots, scaling, softcap, CAPPED) * LOG2_E
        in_row = (key_0 // 32 + tl.arange(0, BN // 32) < words)[None, :]
        word = tl.load(OPEN + key_0 // 32, mask=in_row & there[:, None], other=0)
        bits = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        left = tl.reshape(bits, [RB, BN]) == 0
        left = left & (key[None, :] >= whole_first[:, None]) & (key[None, :] < whole_stop[:, None])
        left = left & are_real(KEY_VALID, key, m)[None, :]
        logits = tl.where(left, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.math.exp2(peak - base)
        weights = tl.math.exp2(logits - base[:, None])
        mass = mass * decay + tl.sum(weights, 1)
        most = weights.to(v.dtype)
        weighted = tl.dot(most, v, weighted * decay[:, None], input_precision=PRECISION)
        if TILTED:
            keys = tl.dot(most, k, keys * decay[:, None], input_precision=PRECISION)
            if K.dtype.element_ty != tl.float32:
                keys = tl.dot((weights - most.to(tl.float32)).to(k.dtype), k, keys)
        peak = higher
    to = flat * blocks + block
    tl.store(PEAK + to, peak, mask=there)
    tl.store(MASS + to, mass, mask=there)
    store_rows(WEIGHTED + flat * blocks * DV, block, DV, weighted, there, DV, DVP)
    if TILTED:
        mean_key = keys / tl.where(mass > 0, mass, 1.0)[:, None]
        store_rows(MEAN_KEYS + flat * blocks * D, block, D, mean_key, there, D, DP)


@triton.jit
def _add_to_list(LIST, OPEN, key_0, words, filled, CHUNK: tl.constexpr):
    """Appends the opened keys of ``[key_0, key_0 + CHUNK)``; how many there are then. The barriers
    keep the threads of the program together."""
    key = key_0 + tl.arange(0, CHUNK)
    word = tl.load(OPEN + key // 32, mask=key // 32 < words, other=0)
    opened = (word >> (key % 32)) & 1
    tl.debug_barrier()
    tl.store(LIST + filled + tl.cumsum(opened, 0) - 1, key, mask=opened == 1)
    tl.debug_barrier()
    return filled + tl.sum(opened, 0)


@triton.jit
def _list_step(
    q, K, V, key, skn, svn, begin, stop, scaling, softcap, peak, mass, weighted,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, FULL: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over some keys; unless all are there (``FULL``), some are -1."""
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    k_at = K + key.to(tl.int64)[:, None] * skn + d[None, :]
    v_at = V + key.to(tl.int64)[:, None] * svn + dv[None, :]
    if FULL and D == DP:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=(key >= 0)[:, None] & (d < D)[None, :], other=0.0)
    if FULL and DV == DVP:
        v = tl.load(v_at)
    else:
        v = tl.load(v_at, mask=(key >= 0)[:, None] & (dv < DV)[None, :], other=0.0)
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = logits_of(dots, scaling, softcap, CAPPED) * LOG2_E
    visible = (key[None, :] >= begin[:, None]) & (key[None, :] < stop[:, None])
    logits = tl.where(visible, logits, float("-inf"))
    return softmax_step(logits, v, peak, mass, weighted, PRECISION)


@triton.jit
def attend_kernel(
    Q, K, V, OUTPUT, LSE, OPEN, ROWS, INTERVALS, MEANS, PEAK, MASS, WEIGHTED, MEAN_KEYS, SINKS,
    LISTS,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    heads, n, m, blocks, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, SIDE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    TILTED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries over the keys it opened, merged with what the tail says of the others.
    Grid: (blocks, batch * heads)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    flat = tl.program_id(1).to(tl.int64)
    head, batch = flat % heads, flat // heads
    LISTS += (flat * tl.num_programs(0) + block) * (CHUNK + BN)
    Q += batch * sqb + head * sqh
    K += batch * skb + head // GROUP * skh
    V += batch * svb + head // GROUP * svh
    of_mask = batch * mask_step
    INTERVALS += of_mask * n * 2
    OPEN += (flat * blocks + block) * words
    query = block * SIDE + tl.arange(0, SIDE)
    inside = query < n
    begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
    stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)
    q = load_rows(Q, query, sqn, inside, D, DP)
    peak = tl.full([SIDE], float("-inf"), tl.float32)
    mass = tl.zeros([SIDE], tl.float32)
    weighted = tl.zeros([SIDE, DVP], tl.float32)

    _whole, _whole_stop, seen_first, seen_stop = block_row_facts(
        ROWS + of_mask * blocks * ROW_FACTS, block, True
    )
    lane = tl.arange(0, BN)
    filled = 0
    here = tl.full([BN], -1, tl.int32)
    for key_0 in range(seen_first // 32 * 32, seen_stop, CHUNK):
        filled = _add_to_list(LISTS, OPEN, key_0, words, filled, CHUNK)
        full = filled // BN * BN
        # The next keys are read a step ahead; those that fill no step wait for the next chunk.
        here = tl.load(LISTS + lane, mask=lane < filled, other=-1)
        for at in tl.range(0, full, BN, num_stages=STAGES):
            key = here
            here = tl.load(LISTS + at + BN + lane, mask=at + BN + lane < filled, other=-1)
            peak, mass, weighted = _list_step(
                q, K, V, key, skn, svn, begin, stop, scaling, softcap, peak, mass, weighted,
                D, DP, DV, DVP, True, CAPPED, PRECISION,
            )  # fmt: skip
        filled -= full
        tl.debug_barrier()
        tl.store(LISTS + lane, here, mask=here >= 0)
    if filled > 0:
        peak, mass, weighted = _list_step(
            q, K, V, here, skn, svn, begin, stop, scaling, softcap, peak, mass, weighted,
            D, DP, DV, DVP, False, CAPPED, PRECISION,
        )  # fmt: skip
    to = flat * n + query
    tl.store(LSE + to, (peak + tl.math.log2(mass)) * LN_2, mask=inside)

    at = flat * blocks + block
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    more = tl.load(MASS + at) + tl.zeros([SIDE], tl.float32)
    added = tl.load(WEIGHTED + at * DV + dv, mask=dv < DV, other=0.0)[None, :]
    other = tl.load(PEAK + at) + tl.zeros([SIDE], tl.float32)
    if TILTED:
        mean = tl.load(MEANS + at * D + d, mask=d < D, other=0.0)
        mean_key = tl.load(MEAN_KEYS + at * D + d, mask=d < D, other=0.0)
        tilt = tl.sum((q.to(tl.float32) - mean[None, :]) * mean_key[None, :], 1)
        other += tilt * scaling * LOG2_E
    peak, mass, weighted = merged(peak, mass, weighted, other, more, added)
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2_E + tl.zeros([SIDE], tl.float32)
        none = tl.zeros([SIDE, DVP], tl.float32)
        one = tl.full([SIDE], 1.0, tl.float32)
        peak, mass, weighted = merged(peak, mass, weighted, sink, one, none)
    seeing = (stop > begin) & (mass > 0)
    result = tl.where(seeing[:, None], weighted / tl.where(mass > 0, mass, 1.0)[:, None], 0.0)
    OUTPUT += batch * sob + head * soh
    store_rows(OUTPUT, query, son, result, inside, DV, DVP)
