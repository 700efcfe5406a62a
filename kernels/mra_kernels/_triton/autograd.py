"""The kernels as operators of torch, opaque to torch.compile: a forward and a backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mra_kernels._triton import exporting
from mra_kernels._triton.backward import gradients
from mra_kernels._triton.exported import exported_mask_tables
from mra_kernels._triton.forward import attend
from mra_kernels._triton.mask_tables import MaskTables, mask_tables
from mra_kernels._triton.plan import Settings, selection_of
from mra_kernels._triton.pooling import pooled
from mra_kernels._triton.selection import select, tally_space
from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import Selection

_LOG2_E = math.log2(math.e)


def _readable(tokens: Tensor) -> Tensor:
    """``[B, H, n, d]`` as kernels can read it, or else a copy: features adjacent, and tokens near
    enough for offsets within a tile, which are of 32 bits; all others are of 64."""
    near = tokens.stride(-1) == 1 and tokens.stride(2) < 1 << 24
    return tokens if near else tokens.contiguous()


@torch.library.custom_op("mra_kernels::mra_forward", mutates_args=())
def mra_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    means: list[Tensor],
    budgets: Tensor,
    tables: list[Tensor],
    key_valid: Tensor | None,
    query_pooled: Tensor | None,
    query_rows: int,
    side: int,
    coarse: str,
    less_best: bool,
    by_row: bool,
    by_count: bool,
    first_blocks: int,
    diagonal_blocks: int,
    offset: int,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """MRA attention and what its backward pass needs. For arguments see `MaskTables`, `Settings`.

    Returns:
        Output, lse, total, opened, rescued, means of queries, keys and values, and peak, as in
        `Attended` and `Plan`; without elements where there is no such thing.
    """
    settings = Settings(
        query_rows, side, coarse, less_best, by_row, by_count, first_blocks, diagonal_blocks,
        offset, scaling, softcap,
    )  # fmt: skip
    intervals, rows, keys_per_block, first = tables
    described = MaskTables(intervals, rows, keys_per_block, first, key_valid, query_pooled)
    new_key, new_value = (None, None) if means else (key, value)
    if coarse == "none":
        new_value = None
    flat = query.shape[0] * query.shape[1]
    width = max(query.shape[3], value.shape[3])
    n_tallies = tally_space(flat, described, width, settings)
    q_means, k_means, v_means, zeros = pooled(
        query, new_key, new_value, query_pooled, key_valid, query_rows, side, n_tallies + flat
    )
    tallies, arrived = zeros.split([n_tallies, flat])

    def given(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x

    k, v = (means[0], means[1]) if means else (k_means, v_means)
    assert k is not None
    plan = select(q_means, k, v, described, budgets, settings, tallies)
    result = attend(query, key, value, described, plan, k, v, sinks, settings, arrived)
    return (
        *result,
        plan.opened,
        given(plan.rescued),
        q_means,
        given(k_means),
        given(v_means),
        given(plan.peak),
    )


@mra_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, means: list[Tensor],
    budgets: Tensor, tables: list[Tensor], key_valid: Tensor | None, query_pooled: Tensor | None,
    query_rows: int, side: int, coarse: str, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, n, width), (kv_heads, _, value_width) = query.shape, value.shape[1:]
    rows, cols = tables[1].shape[1], tables[2].shape[1]

    def floats(*shape: Any, there: bool = True) -> Tensor:
        return query.new_empty(shape if there else 0, dtype=torch.float32)

    rescued = query.new_empty(
        (batch * heads, rows) if coarse == "none" else 0,
        dtype=torch.int32 if coarse == "none" else query.dtype,
    )
    return (
        value.new_empty(batch, heads, n, value_width),
        floats(batch, heads, n),
        floats(batch, heads, n),
        query.new_empty((batch * heads, rows, -(-cols // 32)), dtype=torch.int32),
        rescued,
        floats(batch, heads, rows, width),
        floats(batch, kv_heads, cols, width, there=not means),
        floats(batch, kv_heads, cols, value_width, there=not means and coarse != "none"),
        floats(batch * heads, rows, there=coarse == "pooled"),
    )


@torch.library.custom_op("mra_kernels::mra_backward", mutates_args=())
def mra_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    lse_ratio: Tensor | None,
    opened: Tensor,
    peak: Tensor,
    means: list[Tensor],
    tables: list[Tensor],
    key_valid: Tensor | None,
    query_pooled: Tensor | None,
    query_rows: int,
    side: int,
    coarse: str,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, and ``grad . output``; see `gradients`."""
    intervals, rows, keys_per_block, first = tables
    described = MaskTables(intervals, rows, keys_per_block, first, key_valid, query_pooled)
    settings = Settings(query_rows, side, coarse, True, True, True, 0, 0, 0, scaling, softcap)
    return gradients(
        query,
        key,
        value,
        output,
        total,
        lse_ratio,
        _readable(grad),
        peak if coarse == "pooled" else None,
        None if coarse == "none" else (means[0], means[1], means[2]),
        opened,
        described,
        settings,
    )


@mra_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, total: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    return dq, dk, dv, total.new_empty(total.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, sinks, means, _, tables, key_valid, query_pooled, *settings = inputs
    result, lse, total, opened, _, *new_means, peak = output
    if means:
        new_means[1:] = means
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        query, key, value, sinks, result, lse, total, opened, peak, key_valid, query_pooled,
        *new_means, *tables,
    )  # fmt: skip
    ctx.given_means = len(means)
    ctx.settings = *settings[:3], *settings[-2:]


def _backward(
    ctx: Any, grad: Tensor | None, lse_grad: Tensor | None, *others: None
) -> tuple[Any, ...]:
    query, key, value, sinks, output, lse, total, opened, peak, valid, pooled_q, *rest = (
        ctx.saved_tensors
    )
    lse_ratio = None
    if lse_grad is not None:
        # What exact weights gain in a softmax of their own, but for what float32 can't hold.
        gain = torch.exp2((total - lse * _LOG2_E).clamp(max=126.0))
        lse_ratio = (lse_grad * gain).masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv, delta = mra_backward(
        torch.zeros_like(output) if grad is None else grad,
        query, key, value, output, total, lse_ratio, opened, peak, rest[:3], rest[3:], valid,
        pooled_q, *ctx.settings,
    )  # fmt: skip
    dsinks = None
    if sinks is not None:
        weights = torch.exp2(sinks.float()[None, :, None] * _LOG2_E - total)
        weights = weights.masked_fill(total == -torch.inf, 0.0)
        dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dsinks, [None] * ctx.given_means, None, [None] * 4, *(None,) * 13


mra_forward.register_autograd(_backward, setup_context=_keep)


def _refuse_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("triton has no gradients of gradients; use impl='reference'")


mra_backward.register_autograd(_refuse_twice)


def mra_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
    means: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Selection]:
    """See `mra_kernels._triton.mra_triton`."""
    described = exported_mask_tables if exporting() else mask_tables
    tables, budgets = described(mask, config)
    query, key, value = (_readable(x) for x in (query, key, value))
    output, lse, _, opened, rescued, q_means, k_means, *_ = mra_forward(
        query,
        key,
        value,
        sinks,
        list(means or ()),
        budgets,
        list(tables[:4]),
        tables.key_valid,
        tables.query_pooled,
        *Settings.of(config, rule, mask.query_offset),
    )
    output = for_blind_rows(output, value, mask, sinks)
    selection = selection_of(
        opened,
        rescued if config.coarse == "none" else None,
        q_means.detach(),
        k_means.detach() if means is None else means[0],
        mask,
        config,
        rule,
    )
    return output, lse, selection
