"""How far each key is from each block of queries, estimated from features in bytes.

Distances are worked out where they are needed and never stored: here they are counted, in
keys_choice.py those that are near enough become bits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mra_kernels import keys
from mra_kernels._triton.primitives import (
    LN_2,
    LOG2_E,
    ROW_FACTS,
    block_row_facts,
    load_rows,
    run_of_rows,
)

STEPS = tl.constexpr(128)
"""Distances are from 0 to 127."""

_FARTHEST = tl.constexpr(keys.FARTHEST)
_STEPS_PER_NAT = tl.constexpr(keys.STEPS_PER_NAT)
_APART = tl.constexpr(keys.APART)
_CHUNK = tl.constexpr(64)
_CLOSE = tl.constexpr(32)
"""See the constants of the same names in `mra_kernels.keys`."""

_LOG2_APART = tl.constexpr(math.log2(keys.APART))
SILENT = tl.constexpr(-(1 << 30))
"""Takes the products of a query that doesn't speak for its block below all others."""


@triton.jit
def are_real(KEY_VALID, key, m):
    """Which keys there are that aren't padding."""
    real = key < m
    if KEY_VALID is not None:
        real = real & (tl.load(KEY_VALID + key, mask=real, other=0) != 0)
    return real


@triton.jit
def each_key(of_block, BLOCKS: tl.constexpr, BN: tl.constexpr):
    """What is said of blocks ``[BLOCKS]``, for each key and block."""
    return tl.reshape(tl.broadcast_to(of_block[None, :], [BN, BLOCKS]), [BN * BLOCKS])


@triton.jit
def tile_rows(BLOCKS: tl.constexpr, SIDE: tl.constexpr):
    """Queries in the order in which a tile holds them: blocks take turns every few columns, so that
    a thread of a matrix instruction, which gets two of every eight, gets those of one block."""
    lane, few = tl.arange(0, BLOCKS * SIDE), 8 // BLOCKS
    return lane % 8 // few * SIDE + lane // 8 * few + lane % few


@triton.jit
def most_of_blocks(x, BLOCKS: tl.constexpr, SIDE: tl.constexpr, BN: tl.constexpr):
    """The largest number of each block, ``[BN, BLOCKS * SIDE]`` in the order of `tile_rows` to
    ``[BN * BLOCKS]``."""
    x = tl.reshape(x, [BN, BLOCKS * SIDE // 8, BLOCKS, 8 // BLOCKS])
    return tl.reshape(tl.max(tl.max(x, 3), 1), [BN * BLOCKS])


@triton.jit
def distances(
    k, q, zero, unit, key, favoured, BLOCKS: tl.constexpr, SIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Steps that keys are away from the nearest query of each block, for each key and, within
    that, block: int32 ``[BN * BLOCKS]``, as are ``unit`` and ``key``.

    Args:
        k, q: Features of keys and queries, int8 ``[BN, RP]`` and ``[BLOCKS * SIDE, RP]``, queries
            in the order of `tile_rows`.
        zero: What queries' log-sum-exps take off their products, int32 ``[BLOCKS * SIDE]``.
        unit: Nats that a product of a block counts.
        favoured: One past the last key that goes first.
    """
    start = tl.zeros([BN, BLOCKS * SIDE], tl.int32) + zero[None, :]
    above = tl.dot(k, tl.trans(q), start, out_dtype=tl.int32)
    nearest = most_of_blocks(above, BLOCKS, SIDE, BN)
    away = nearest.to(tl.float32) * (unit * -_STEPS_PER_NAT)
    steps = tl.minimum(tl.maximum(away, 0.0), _FARTHEST - 1.0).to(tl.int32) + 1
    return tl.where(key < favoured, 0, steps)


@triton.jit
def _log_sum_step(
    q, K, KEY_VALID, key, counts, more, unit, begin, stop, m, peak, mass, RP: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp in base 2 over the ``counts`` of some keys, each ``2 ** more`` times."""
    k = load_rows(K, key, RP, key < m, RP, RP)
    real = are_real(KEY_VALID, key, m)
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * (unit * LOG2_E)[:, None]
    visible = (key[None, :] >= begin[:, None]) & (key[None, :] < stop[:, None])
    scores = tl.where(visible & real[None, :] & counts, scores + more, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    mass = mass * tl.math.exp2(peak - base) + tl.sum(tl.math.exp2(scores - base[:, None]), 1)
    return higher, mass


@triton.jit
def estimate_kernel(
    Q, K, UNIT, ROWS, INTERVALS, FIRST_KEY, KEY_VALID, COUNTED, ZERO, TALLIES,
    heads, n, m, blocks, first_keys, mask_step,
    SIDE: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What queries' estimated log-sum-exps take off their products, and how many whole keys are at
    each distance of each block. Grid: (tiles of ``BM`` queries, batch * heads)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last have most to do: they go first
    head = tl.program_id(1).to(tl.int64)
    batch = head // heads * mask_step
    Q += head * n * RP
    K += head * m * RP
    INTERVALS += batch * n * 2
    if KEY_VALID is not None:
        KEY_VALID += batch * m
    BLOCKS: tl.constexpr = BM // SIDE
    query = tile * BM + tile_rows(BLOCKS, SIDE)
    inside = query < n
    q = load_rows(Q, query, RP, inside, RP, RP)
    begin = tl.load(INTERVALS + query.to(tl.int64) * 2, mask=inside, other=0)
    stop = tl.load(INTERVALS + query.to(tl.int64) * 2 + 1, mask=inside, other=0)
    own = tl.load(UNIT + head * blocks + query // SIDE, mask=inside, other=1.0)
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    unit = tl.load(UNIT + head * blocks + block, mask=block < blocks, other=1.0)
    whole_first, whole_stop, seen_first, seen_stop = block_row_facts(
        ROWS + batch * blocks * ROW_FACTS, block, block < blocks
    )
    first_key = tl.load(FIRST_KEY + batch)

    # Keys around a block's diagonal and the first ones count singly, of the others some for all.
    peak = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    place = query // SIDE * SIDE + m - n
    low = (place - _CLOSE) >> 6
    high = (place + SIDE + _CLOSE - 1) >> 6
    front = first_key // _CHUNK
    lane = tl.arange(0, _CHUNK)
    peak, mass = _log_sum_step(
        q, K, KEY_VALID, front * _CHUNK + lane, (query >= 0)[:, None], 0.0, own, begin, stop, m,
        peak, mass, RP,
    )  # fmt: skip
    chunks = tl.minimum(tl.max(high, 0) + 1, tl.cdiv(m, _CHUNK))
    for chunk in range(tl.maximum(tl.min(low, 0), 0), chunks):
        singly = (chunk >= low) & (chunk <= high) & (chunk != front)
        peak, mass = _log_sum_step(
            q, K, KEY_VALID, chunk * _CHUNK + lane, singly[:, None], 0.0, own, begin, stop, m,
            peak, mass, RP,
        )  # fmt: skip
    STRIDE: tl.constexpr = _CHUNK * _APART
    first, last = run_of_rows(seen_first, seen_stop, block < blocks, m, STRIDE)
    for key_0 in range(first, last, STRIDE):
        key = key_0 + lane * _APART
        own_chunk = (key // _CHUNK)[None, :]
        often = (own_chunk < low[:, None]) | (own_chunk > high[:, None])
        often = often & (own_chunk != front)
        peak, mass = _log_sum_step(
            q, K, KEY_VALID, key, often, _LOG2_APART, own, begin, stop, m, peak, mass, RP
        )
    speaks = inside & (mass > 0)
    if COUNTED is not None:
        speaks = speaks & (tl.load(COUNTED + batch * n + query, mask=inside, other=0) != 0)
    log_sum = (peak + tl.math.log2(tl.where(mass > 0, mass, 1.0))) * LN_2
    units = tl.floor(tl.where(speaks, log_sum, 0.0) / own + 0.5).to(tl.int32)
    zero = tl.where(speaks, -units, SILENT)
    tl.store(ZERO + head * n + query, zero, mask=inside)

    tally = tl.zeros([BLOCKS * STEPS], tl.int32)
    first, last = run_of_rows(whole_first, whole_stop, block < blocks, m, BN)
    whole_first = each_key(whole_first, BLOCKS, BN)
    whole_stop = each_key(whole_stop, BLOCKS, BN)
    unit = each_key(unit, BLOCKS, BN)
    bins = each_key(tl.arange(0, BLOCKS) * STEPS, BLOCKS, BN)
    for key_0 in range(first, last, BN):
        rows = key_0 + tl.arange(0, BN)
        k = load_rows(K, rows, RP, rows < m, RP, RP)
        key = key_0 + tl.arange(0, BN * BLOCKS) // BLOCKS
        steps = distances(k, q, zero, unit, key, first_key + first_keys, BLOCKS, SIDE, BN)
        whole = (key >= whole_first) & (key < whole_stop) & are_real(KEY_VALID, key, m)
        tally += tl.histogram(bins + steps, BLOCKS * STEPS, mask=whole)
    which = tile * BLOCKS + tl.arange(0, BLOCKS * STEPS) // STEPS
    to = TALLIES + (head * blocks + tile * BLOCKS) * STEPS + tl.arange(0, BLOCKS * STEPS)
    tl.store(to, tally, mask=which < blocks)
