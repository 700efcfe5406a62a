"""Masked block means of queries, keys and values, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.primitives import load_rows


@triton.jit
def _pool_block(
    X, MEANS, VALID, batch, head, block, sb, sh, sn, heads, n, valid_step,
    D: tl.constexpr, DP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    AT_ONCE: tl.constexpr = 64 if SIDE > 64 else SIDE
    base = X + batch * sb + head.to(tl.int64) * sh
    sums = tl.zeros([DP], tl.float32)
    count = 0.0
    for first in range(0, SIDE, AT_ONCE):
        token = block * SIDE + first + tl.arange(0, AT_ONCE)
        counted = token < n
        if VALID is not None:
            real = tl.load(VALID + batch * valid_step + token, mask=counted, other=0)
            counted = counted & (real != 0)
        sums += tl.sum(load_rows(base, token, sn, counted, D, DP).to(tl.float32), 0)
        count += tl.sum(counted.to(tl.float32), 0)
    d = tl.arange(0, DP)
    row = (batch * heads + head) * tl.cdiv(n, SIDE) + block
    tl.store(MEANS + row * D + d, sums / tl.maximum(count, 1.0), mask=d < D)


@triton.jit
def pool_kernel(
    Q, K, V, Q_MEANS, K_MEANS, V_MEANS, Q_VALID, K_VALID, ZEROS,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    heads, kv_heads, n, m, q_valid_step, k_valid_step, n_zeros,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    QUERY_ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Writes zeros that later launches need, too. Grid: (most blocks of any input, query heads
    and twice the key heads, batch)."""
    block, which, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks, inputs = tl.num_programs(0), tl.num_programs(1)
    own = (tl.program_id(2) * inputs + which) * blocks + block
    for first in range(own * 256, n_zeros, blocks * inputs * tl.num_programs(2) * 256):
        at = first + tl.arange(0, 256)
        tl.store(ZEROS + at, tl.zeros([256], tl.int64), mask=at < n_zeros)
    if which < heads:
        if block * QUERY_ROWS < n:
            _pool_block(
                Q, Q_MEANS, Q_VALID, batch, which, block, sqb, sqh, sqn, heads, n, q_valid_step,
                D, DP, QUERY_ROWS,
            )  # fmt: skip
    elif which < heads + kv_heads:
        if K is not None and block * SIDE < m:
            _pool_block(
                K, K_MEANS, K_VALID, batch, which - heads, block, skb, skh, skn, kv_heads, m,
                k_valid_step, D, DP, SIDE,
            )  # fmt: skip
    elif V is not None and block * SIDE < m:
        _pool_block(
            V, V_MEANS, K_VALID, batch, which - heads - kv_heads, block, svb, svh, svn, kv_heads,
            m, k_valid_step, DV, DVP, SIDE,
        )  # fmt: skip


def pooled(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    query_rows: int,
    side: int,
    n_zeros: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Means of the blocks of each input that is given, float32 ``[B, heads, blocks, D]``; and
    zeros, int64 ``[n_zeros]``.

    Args:
        query, key, value: ``[B, H, N, D]``, ``[B, Hkv, M, D]``, ``[B, Hkv, M, Dv]``.
        query_valid, key_valid: Tokens that count, bool ``[B or 1, N]`` and ``[B or 1, M]``.
        query_rows, side: Queries and keys per block, powers of two.
    """

    def means(tokens: Tensor | None, length: int) -> Tensor | None:
        if tokens is None:
            return None
        shape = (*tokens.shape[:2], -(-tokens.shape[2] // length), tokens.shape[3])
        return tokens.new_empty(shape, dtype=torch.float32)

    q_means, k_means, v_means = means(query, query_rows), means(key, side), means(value, side)
    assert q_means is not None
    batch, heads, n, width = query.shape
    kv_heads, m = (0, 0) if key is None else key.shape[1:3]
    value_width = width if value is None else value.shape[3]

    def step(valid: Tensor | None) -> int:
        return 0 if valid is None or valid.shape[0] == 1 else valid.shape[1]

    def strides(tokens: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if tokens is None else tokens.stride()[:3]

    zeros = query.new_empty(n_zeros, dtype=torch.int64)
    grid = (max(-(-n // query_rows), -(-m // side)), heads + 2 * kv_heads, batch)
    tuning.launch(
        pool_kernel, grid,
        query, key, value, q_means, k_means, v_means, query_valid, key_valid, zeros,
        *strides(query), *strides(key), *strides(value),
        heads, kv_heads, n, m, step(query_valid), step(key_valid), n_zeros,
        D=width, DP=tuning.padded(width), DV=value_width, DVP=tuning.padded(value_width),
        QUERY_ROWS=query_rows, SIDE=side, num_warps=2,
    )  # fmt: skip
    return q_means, k_means, v_means, zeros
