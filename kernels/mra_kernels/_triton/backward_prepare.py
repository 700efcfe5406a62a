"""What the launches of a backward pass need of each query and row of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.primitives import load_rows


@triton.jit
def prepare_kernel(
    OUTPUT, GRAD, TOTAL, PEAK, QUERY_POOLED, DELTA, BLOCK_GRAD, BLOCK_DELTA, SHARE,
    sob, soh, son, sgb, sgh, sgn, heads, n, rows, mask_step,
    DV: tl.constexpr, DVP: tl.constexpr, QUERY_ROWS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """``grad . output`` of each query and, for ``POOLED``, the gradient of its block's row and the
    share a pooled query has of its mean. Grid: (rows of blocks, batch * heads)."""
    row = tl.program_id(0)
    flat = tl.program_id(1).to(tl.int64)
    batch, head = flat // heads, flat % heads
    AT_ONCE: tl.constexpr = 64 if QUERY_ROWS > 64 else QUERY_ROWS
    at = flat * rows + row
    block_grad = tl.zeros([DVP], tl.float32)
    block_delta, count = 0.0, 0.0
    for first in range(0, QUERY_ROWS, AT_ONCE):
        query = row * QUERY_ROWS + first + tl.arange(0, AT_ONCE)
        inside = query < n
        output = load_rows(OUTPUT + batch * sob + head * soh, query, son, inside, DV, DVP)
        grad = load_rows(GRAD + batch * sgb + head * sgh, query, sgn, inside, DV, DVP)
        grad = grad.to(tl.float32)
        delta = tl.sum(grad * output.to(tl.float32), 1)
        tl.store(DELTA + flat * n + query, delta, mask=inside)
        if POOLED:
            total = tl.load(TOTAL + flat * n + query, mask=inside, other=float("-inf"))
            seeing = total > float("-inf")
            peak = tl.load(PEAK + at)
            factor = tl.where(seeing, tl.math.exp2(peak - tl.where(seeing, total, 0.0)), 0.0)
            block_grad += tl.sum(factor[:, None] * grad, 0)
            block_delta += tl.sum(factor * delta, 0)
            counted = inside
            if QUERY_POOLED is not None:
                at_query = QUERY_POOLED + batch * mask_step * n + query
                counted = tl.load(at_query, mask=inside, other=0) != 0
            count += tl.sum(counted.to(tl.float32), 0)
    if POOLED:
        d = tl.arange(0, DVP)
        tl.store(BLOCK_GRAD + at * DV + d, block_grad, mask=d < DV)
        tl.store(BLOCK_DELTA + at, block_delta)
        tl.store(SHARE + at, 1 / tl.maximum(count, 1.0))


def prepare(
    output: Tensor,
    grad: Tensor,
    total: Tensor,
    peak: Tensor | None,
    tables: MaskTables,
    query_rows: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What later launches need of each query and row of blocks; see `prepare_kernel`.

    Args:
        output, grad: ``[B, H, N, Dv]``, features adjacent.
        total: ``[B, H, N]``.
        peak: ``[B * H, R]`` for ``coarse="pooled"``, else None.

    Returns:
        ``grad . output`` float32 ``[B, H, N]``, and for ``pooled`` float32 gradients of rows of
        blocks ``[B, H, R, Dv]``, the same weighted by output ``[B, H, R]``, and shares
        ``[B, H, R]``.
    """
    batch, heads, n, width = output.shape
    rows = tables.rows.shape[1]
    delta = torch.empty_like(total)
    pooled = peak is not None
    block_grad = total.new_empty(batch, heads, rows, width) if pooled else None
    block_delta, share = (total.new_empty(batch, heads, rows) if pooled else None for _ in "ab")
    tuning.launch(
        prepare_kernel, (rows, batch * heads),
        output, grad, total, peak, tables.query_pooled, delta, block_grad, block_delta, share,
        *output.stride()[:3], *grad.stride()[:3], heads, n, rows, int(tables.rows.shape[0] > 1),
        DV=width, DVP=tuning.padded(width), QUERY_ROWS=query_rows, POOLED=pooled, num_warps=4,
    )  # fmt: skip
    return delta, block_grad, block_delta, share
