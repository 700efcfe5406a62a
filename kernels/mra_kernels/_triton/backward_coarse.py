"""Gradients of the coarse term, between rows and block means.

The rows are queries, each with the gradient of its output, for ``coarse="per_query"``; their own
gradients are left to `backward_query_kernel`, which reads them anyway. For ``pooled`` rows are
block means: the weights of a block's queries differ by a factor ``exp(-lse)`` only, so their
gradients, summed with it, are the gradient of one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
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
def coarse_tile(
    x, X, grad, GRAD, norm, delta, row, n, k_mean, K_MEANS, v_mean, V_MEANS, col, OPEN, ROWS, KEYS,
    rows, cols, words, scaling, softcap, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of pairs that are left, and gradients of their scaled dot products: float32
    ``[RB, CB]``."""
    of_block = row // BLOCK
    inside = of_block < rows
    whole_first, whole_stop, _, _ = block_row_facts(ROWS, of_block, inside)
    at = OPEN + of_block.to(tl.int64)[:, None] * words + (col // 32)[None, :]
    word = tl.load(at, mask=inside[:, None] & (col < cols)[None, :], other=-1)
    n_keys = tl.load(KEYS + col, mask=col < cols, other=0)
    left = ((word >> (col % 32)[None, :]) & 1) == 0
    left = left & (col[None, :] >= whole_first[:, None]) & (col[None, :] < whole_stop[:, None])
    left = left & (n_keys > 0)[None, :]
    at = col.to(tl.int64)
    there = col < cols
    dots = row_dots(x, X, row < n, k_mean, K_MEANS + at * D, there, D, DP, PRECISION)
    size = tl.math.log2(tl.maximum(n_keys, 1).to(tl.float32))
    logits = logits_of(dots, scaling, softcap, CAPPED)
    exponents = logits * LOG2_E + size[None, :] - norm[:, None]
    weights = tl.math.exp2(tl.where(left, exponents, float("-inf")))
    at = V_MEANS + at * DV
    values = row_dots(grad, GRAD, row < n, v_mean, at, there, DV, DVP, PRECISION)
    ddots = weights * (values - delta[:, None])
    if CAPPED:
        ddots = ddots * cap_slope(logits, softcap)
    return weights, ddots


@triton.jit
def coarse_rows_kernel(
    X, GRAD, NORM, DELTA, K_MEANS, V_MEANS, OPEN, ROWS, KEYS, DX,
    heads, rows, cols, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of mean queries. Grid: (tiles, batch * heads)."""
    flat = tl.program_id(1).to(tl.int64)
    of_mask = flat // heads * mask_step
    row = tl.program_id(0) * RB + tl.arange(0, RB)
    inside = row < rows
    at = flat * rows + row
    x = load_rows(X, at, D, inside, D, DP)
    grad = load_rows(GRAD, at, DV, inside, DV, DVP)
    norm = load_norm(NORM, at, inside)
    delta = tl.load(DELTA + at, mask=inside, other=0.0)
    K_MEANS += flat // GROUP * cols * D
    V_MEANS += flat // GROUP * cols * DV
    OPEN += flat * rows * words
    ROWS += of_mask * rows * ROW_FACTS
    KEYS += of_mask * cols
    dx = tl.zeros([RB, DP], tl.float32)
    whole_first, whole_stop, _, _ = block_row_facts(ROWS, row, inside)
    begin, end = run_of_rows(whole_first, whole_stop, inside, cols, CB)
    for col_0 in range(begin, end, CB):
        col = col_0 + tl.arange(0, CB)
        k_mean = load_rows(K_MEANS, col, D, col < cols, D, DP)
        v_mean = load_rows(V_MEANS, col, DV, col < cols, DV, DVP)
        _weights, ddots = coarse_tile(
            x, X + at * D, grad, GRAD + at * DV, norm, delta, row, rows, k_mean, K_MEANS, v_mean,
            V_MEANS, col, OPEN, ROWS, KEYS, rows, cols, words, scaling, softcap, D, DP, DV, DVP,
            1, CAPPED, PRECISION,
        )  # fmt: skip
        dx = tl.dot(ddots, k_mean, dx, input_precision=PRECISION)
    row = afresh(tl.program_id(0), rows) * RB + tl.arange(0, RB)
    store_rows(DX + flat * rows * D, row, D, dx * scaling, row < rows, D, DP)


@triton.jit
def _rows_with(ROWS, rows, first_col, stop_col, STEP: tl.constexpr):
    """The rows of blocks that may have one of these columns in their coarse term: the first, and
    one past the last."""
    begin = rows
    end = 0
    for row_0 in range(0, rows, STEP):
        row = row_0 + tl.arange(0, STEP)
        whole_first, whole_stop, _, _ = block_row_facts(ROWS, row, row < rows)
        has = tl.maximum(whole_first, first_col) < tl.minimum(whole_stop, stop_col)
        begin = tl.minimum(begin, tl.min(tl.where(has, row, rows), 0))
        end = tl.maximum(end, tl.max(tl.where(has, row + 1, 0), 0))
    return begin, end


@triton.jit
def coarse_cols_kernel(
    X, GRAD, NORM, DELTA, K_MEANS, V_MEANS, OPEN, ROWS, KEYS, DK, DV_MEANS,
    sxb, sxh, sxn, sgb, sgh, sgn, kv_heads, n, rows, cols, words, mask_step, scaling, softcap,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the means of keys and values. Grid: (tiles of columns, batch * key heads).

    ``BLOCK`` rows share a row of blocks.
    """
    kv_flat = tl.program_id(1).to(tl.int64)
    batch = kv_flat // kv_heads
    col = tl.program_id(0) * CB + tl.arange(0, CB)
    there = col < cols
    ROWS += batch * mask_step * rows * ROW_FACTS
    KEYS += batch * mask_step * cols
    K_MEANS += kv_flat * cols * D
    V_MEANS += kv_flat * cols * DV
    k_mean = load_rows(K_MEANS, col, D, there, D, DP).to(X.dtype.element_ty)
    v_mean = load_rows(V_MEANS, col, DV, there, DV, DVP).to(X.dtype.element_ty)
    dk = tl.zeros([CB, DP], tl.float32)
    dv = tl.zeros([CB, DVP], tl.float32)
    first_col = tl.program_id(0) * CB
    begin, end = _rows_with(ROWS, rows, first_col, first_col + CB, 128)
    begin = begin * BLOCK // RB * RB
    end = tl.minimum(end * BLOCK, n)
    for each in range(0, GROUP):
        flat = kv_flat * GROUP + each
        head = flat % (kv_heads * GROUP)
        for row_0 in range(begin, end, RB):
            row = row_0 + tl.arange(0, RB)
            inside = row < n
            x_base = X + batch * sxb + head * sxh
            grad_base = GRAD + batch * sgb + head * sgh
            x = load_rows(x_base, row, sxn, inside, D, DP)
            grad = load_rows(grad_base, row, sgn, inside, DV, DVP)
            norm = load_norm(NORM, flat * n + row, inside)
            delta = tl.load(DELTA + flat * n + row, mask=inside, other=0.0)
            weights, ddots = coarse_tile(
                x, x_base + row.to(tl.int64) * sxn, grad, grad_base + row.to(tl.int64) * sgn, norm,
                delta, row, n, k_mean, K_MEANS, v_mean, V_MEANS, col, OPEN + flat * rows * words,
                ROWS, KEYS, rows, cols, words, scaling, softcap, D, DP, DV, DVP,
                BLOCK, CAPPED, PRECISION,
            )  # fmt: skip
            # What `row_dots` read again takes registers only from here on.
            if x.dtype == tl.float32 and DP > 128:
                x = load_rows(x_base, row, sxn, inside, D, DP)
            if x.dtype == tl.float32 and DVP > 128:
                grad = load_rows(grad_base, row, sgn, inside, DV, DVP)
            dk = tl.dot(tl.trans(ddots).to(x.dtype), x, dk, input_precision=PRECISION)
            dv = tl.dot(tl.trans(weights).to(x.dtype), grad, dv, input_precision=PRECISION)
    col = afresh(tl.program_id(0), n) * CB + tl.arange(0, CB)
    there = col < cols
    store_rows(DK + kv_flat * cols * D, col, D, dk * scaling, there, D, DP)
    store_rows(DV_MEANS + kv_flat * cols * DV, col, DV, dv, there, DV, DVP)


def row_gradients(
    q_means: Tensor,
    grad: Tensor,
    norm: Tensor,
    delta: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    opened: Tensor,
    tables: MaskTables,
    settings: Settings,
) -> Tensor:
    """Gradients of mean queries, float32 ``[B, H, R, D]``.

    Args:
        q_means, grad, norm, delta: Mean queries, and of their rows of blocks gradients, the
            `Plan`'s peaks, and gradients weighted by output, from `prepare`.
        k_means, v_means, opened: As in `column_gradients`.
    """
    dx = torch.empty_like(q_means)
    (batch, heads, rows, _), tile_rows = q_means.shape, 16
    wide = max(q_means.shape[3], v_means.shape[3])
    counts = rows, v_means.shape[2], opened.shape[2], int(tables.rows.shape[0] > 1)
    tuning.launch(
        coarse_rows_kernel, (-(-rows // tile_rows), batch * heads),
        q_means, grad, norm, delta, k_means, v_means, opened, tables.rows, tables.keys_per_block,
        dx, heads, *counts, settings.scaling, settings.softcap or 1.0,
        **_shapes(q_means, v_means, tile_rows, settings), num_warps=4 if wide <= 128 else 8,
    )  # fmt: skip
    return dx


def column_gradients(
    x: Tensor,
    grad: Tensor,
    norm: Tensor,
    delta: Tensor,
    k_means: Tensor,
    v_means: Tensor,
    opened: Tensor,
    tables: MaskTables,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Gradients of means of keys and of values, float32.

    Args:
        x, grad: Queries and gradients of outputs, or the same of rows of blocks, ``[B, H, n, D]``
            and ``[B, H, n, Dv]``, features adjacent.
        norm, delta: ``[B, H, n]``: `Attended.total`, or `Plan.peak`; and from `prepare`.
        k_means, v_means: ``[B, Hkv, C, D]`` and ``[B, Hkv, C, Dv]``.
        opened: Bits of a `Plan`.
    """
    n, (batch, kv_heads, cols, _) = x.shape[2], v_means.shape
    dk, dv = torch.empty_like(k_means), torch.empty_like(v_means)
    counts = n, opened.shape[1], cols, opened.shape[2], int(tables.rows.shape[0] > 1)
    shapes = _shapes(x, v_means, 16, settings)
    tuning.launch(
        coarse_cols_kernel, (-(-cols // shapes["CB"]), batch * kv_heads),
        x, grad, norm, delta, k_means, v_means, opened, tables.rows, tables.keys_per_block, dk, dv,
        *x.stride()[:3], *grad.stride()[:3], kv_heads, *counts, settings.scaling,
        settings.softcap or 1.0, **shapes,
        BLOCK=1 if settings.coarse == "pooled" else settings.query_rows,
        num_warps=4 if max(shapes["D"], shapes["DV"]) <= 64 else 8,
    )  # fmt: skip
    return dk, dv


def _shapes(x: Tensor, v_means: Tensor, tile_rows: int, settings: Settings) -> dict[str, Any]:
    width, value_width = x.shape[3], v_means.shape[3]
    pooled = settings.coarse == "pooled"
    return {
        "GROUP": x.shape[1] // v_means.shape[1],
        "D": width,
        "DP": tuning.padded(width),
        "DV": value_width,
        "DVP": tuning.padded(value_width),
        "RB": tile_rows,
        "CB": 32,
        "CAPPED": settings.softcap is not None,
        "PRECISION": tuning.mean_precision(x.device) if pooled else tuning.precision(),
        "num_stages": 2,
    }
