"""What torch.export sees of masks and features: operators, of whose blocks it knows no number.

Of a number it knows torch asks whether it is 1, and makes another graph for where it is. That is
right for torch.compile, which also fuses what it sees; an exported program has but one graph, for
all lengths.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mra_kernels._triton import against_lengths
from mra_kernels._triton.keys_tables import KeyTables, key_facts, padded_rank
from mra_kernels._triton.mask_tables import MaskTables, mask_tables
from mra_kernels.config import MraAttentionConfig, MraKeysConfig, Scope
from mra_kernels.masks import AttentionMask


def exported_mask_tables(
    mask: AttentionMask, config: MraAttentionConfig
) -> tuple[MaskTables, Tensor]:
    """`mask_tables`, by an operator."""
    *tables, key_valid, query_pooled, budgets = _mask_tables(
        *_told(mask), *config.block_shapes[0], config.budget, config.blocks_per_row, config.scope
    )
    intervals, rows, keys_per_block, first = tables
    padding = _if_there(mask.key_valid, key_valid), _if_there(mask.query_valid, query_pooled)
    return MaskTables(intervals, rows, keys_per_block, first, *padding), budgets


def exported_key_facts(
    query: Tensor, key: Tensor, mask: AttentionMask, config: MraKeysConfig, scaling: float
) -> tuple[list[Tensor], KeyTables, Tensor]:
    """`key_facts`, by an operator."""
    shares = list(config.budget_of_heads(query.shape[1]))
    *features, intervals, rows, first_key, key_valid, counted, budgets = _key_facts(
        query, key, *_told(mask), config.rows, config.rank, shares, scaling
    )
    padding = _if_there(mask.key_valid, key_valid), _if_there(mask.query_valid, counted)
    return features, KeyTables(intervals, rows, first_key, *padding), budgets


def some_size() -> Any:
    """A size of which torch knows nothing but that it is at least 1; for fake tensors."""
    return torch.library.get_ctx().new_dynamic_size(min=1)


@torch.library.custom_op("mra_kernels::mask_tables", mutates_args=())
def _mask_tables(
    start: Tensor,
    stop: Tensor,
    key_valid: Tensor | None,
    query_valid: Tensor | None,
    n_keys: int,
    query_rows: int,
    side: int,
    budget: float,
    blocks_per_row: int | None,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`MaskTables`, without elements for None, and `RowCosts.budgets`.

    Args:
        start, stop, key_valid, query_valid, n_keys: As in `AttentionMask`.
        query_rows, side, budget, blocks_per_row, scope: As in `MraAttentionConfig`.

    Raises:
        ValueError: There are more entries or blocks than the kernels count.
    """
    reason = against_lengths(start.shape[1], n_keys, query_rows, side)
    if reason is not None:
        raise ValueError(
            f"{reason}, got {start.shape[1]} x {n_keys} entries; export with impl='reference'"
        )
    mask = AttentionMask(start, stop, n_keys, key_valid, query_valid)
    config = MraAttentionConfig(
        (side, 1), budget, blocks_per_row, scope=cast(Scope, scope), query_rows=query_rows
    )
    tables, budgets = mask_tables(mask, config)
    intervals, rows, keys_per_block, first, *padding = tables
    return intervals, rows, keys_per_block, first, *_given(start, padding), budgets


@_mask_tables.register_fake
def _(
    start: Tensor, stop: Tensor, key_valid: Tensor | None, query_valid: Tensor | None, n_keys: int,
    query_rows: int, side: int, budget: float, blocks_per_row: int | None, scope: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, (batch, intervals, valid, pooled) = some_size(), _fakes(start, key_valid, query_valid)
    return (
        intervals,
        _whole(start, batch, rows, 8),
        _whole(start, batch, some_size()),
        _whole(start, batch, 2),
        valid,
        pooled,
        start.new_empty(batch, rows if scope == "row" else 2),
    )


@torch.library.custom_op("mra_kernels::key_facts", mutates_args=())
def _key_facts(
    query: Tensor,
    key: Tensor,
    start: Tensor,
    stop: Tensor,
    key_valid: Tensor | None,
    query_valid: Tensor | None,
    n_keys: int,
    rows: int,
    rank: int,
    shares: list[float],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, `KeyTables` without elements for None, and `KeyCosts.budgets`.

    Args:
        query, key, scaling: As in `keys_forward`.
        start, stop, key_valid, query_valid, n_keys: As in `AttentionMask`.
        rows, rank: As in `MraKeysConfig`.
        shares: Its budget of each head.
    """
    mask = AttentionMask(start, stop, n_keys, key_valid, query_valid)
    config = MraKeysConfig(rows, rank=rank, head_budgets=tuple(shares))
    (of_queries, of_keys, unit), tables, budgets = key_facts(query, key, mask, config, scaling)
    intervals, facts, first_key, *padding = tables
    return of_queries, of_keys, unit, intervals, facts, first_key, *_given(start, padding), budgets


@_key_facts.register_fake
def _(
    query: Tensor, key: Tensor, start: Tensor, stop: Tensor, key_valid: Tensor | None,
    query_valid: Tensor | None, n_keys: int, rows: int, rank: int, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    blocks, (batch, intervals, valid, counted) = some_size(), _fakes(start, key_valid, query_valid)
    (entries, heads, n, width), int8 = query.shape, torch.int8
    features = padded_rank(min(rank, width))
    return (
        query.new_empty((entries, heads, n, features), dtype=int8),
        query.new_empty((entries, heads, n_keys, features), dtype=int8),
        query.new_empty((entries, heads, blocks), dtype=torch.float32),
        intervals,
        _whole(start, batch, blocks, 8),
        _whole(start, batch),
        valid,
        counted,
        start.new_empty(batch, heads, 2),
    )


def _told(mask: AttentionMask) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    return mask.start, mask.stop, mask.key_valid, mask.query_valid, mask.n_keys


def _if_there(asked: Tensor | None, answer: Tensor) -> Tensor | None:
    return None if asked is None else answer


def _given(like: Tensor, padding: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """An operator can't return None."""
    valid, counted = (like.new_empty(0, dtype=torch.uint8) if x is None else x for x in padding)
    return valid, counted


def _fakes(
    start: Tensor, key_valid: Tensor | None, query_valid: Tensor | None
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Batch entries with a mask of their own, intervals, and padding of keys and of queries."""
    batch = max(x.shape[0] for x in (start, key_valid, query_valid) if x is not None)

    def padding(valid: Tensor | None) -> Tensor:
        shape = (0,) if valid is None else (batch, valid.shape[1])
        return start.new_empty(shape, dtype=torch.uint8)

    intervals = _whole(start, batch, start.shape[1], 2)
    return batch, intervals, padding(key_valid), padding(query_valid)


def _whole(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)
