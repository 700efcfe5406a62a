"""The kernels as operators of torch, opaque to torch.compile: a forward and a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mra_kernels._triton.forward import attend
from mra_kernels._triton.mask_tables import MaskTables, mask_tables
from mra_kernels._triton.plan import Settings, selection_of
from mra_kernels._triton.pooling import pooled
from mra_kernels._triton.selection import select
from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import Selection


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
        side, coarse, less_best, by_row, by_count, first_blocks, diagonal_blocks, offset, scaling,
        softcap,
    )  # fmt: skip
    intervals, rows, keys_per_block, first = tables
    described = MaskTables(intervals, rows, keys_per_block, first, key_valid, query_pooled)
    new_key, new_value = (None, None) if means else (key, value)
    if coarse == "none":
        new_value = None
    q_means, k_means, v_means = pooled(query, new_key, new_value, query_pooled, key_valid, side)

    def given(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x

    k, v = (means[0], means[1]) if means else (k_means, v_means)
    assert k is not None
    plan = select(q_means, k, v, described, budgets, settings)
    result = attend(query, key, value, described, plan, k, v, sinks, settings)
    return (
        *result,
        plan.opened,
        given(plan.rescued),
        q_means,
        given(k_means),
        given(v_means),
        given(plan.peak),
    )


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
    side = config.resolutions[0]
    tables, costs = mask_tables(mask, side)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output, lse, _, opened, rescued, q_means, k_means, *_ = mra_forward(
        query,
        key,
        value,
        sinks,
        list(means or ()),
        costs.budgets(config),
        list(tables[:4]),
        tables.key_valid,
        tables.query_pooled,
        *Settings.of(config, rule, mask.query_offset),
    )
    if torch.compiler.is_compiling() or mask.blind_rows is not None:
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
    return output, lse.detach(), selection
