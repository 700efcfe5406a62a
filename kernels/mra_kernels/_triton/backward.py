"""The launches of a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mra_kernels._triton import tuning
from mra_kernels._triton.backward_coarse import column_gradients, row_gradients
from mra_kernels._triton.backward_key import backward_key_kernel
from mra_kernels._triton.backward_prepare import prepare
from mra_kernels._triton.backward_query import backward_query_kernel
from mra_kernels._triton.forward import CHUNK, COARSE
from mra_kernels._triton.mask_tables import MaskTables
from mra_kernels._triton.plan import Settings


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

    per_query = (delta, *means[1:]) if means is not None and peak is None else (None,) * 3
    tiles, shapes = cut("backward_query", m)
    lists = opened.new_empty((batch * heads, tiles, shapes["CHUNK"]))
    tuning.launch(
        backward_query_kernel, (tiles, batch * heads),
        query, key, value, grad, total, pull, dq, opened, tables.rows, tables.keys_per_block,
        tables.intervals, tables.key_valid, tables.query_pooled, coarse_dq, share,
        *per_query, lists,
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
