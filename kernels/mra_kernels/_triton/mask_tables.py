"""What the kernels are told of a mask: O(N + M) numbers, in torch, kept for the next call.

A row of blocks sees one run of key blocks, and all its queries see every real key of a run inside
that: the pairs of the inner run are whole, the others are cut through. So no kernel asks a pair
what the mask does to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.pyramid import each_row

END = 1 << 62
"""Beyond every key."""


class MaskTables(NamedTuple):
    """A mask in blocks of ``query_rows`` by ``side``, for a batch of ``B``, or 1 if all entries
    share it.

    Attributes:
        intervals: First visible key and one past the last of each query, int32 ``[B, N, 2]``; 0 and
            0 where none is visible.
        rows: Of each row of blocks, int32 ``[B, R, 8]``: first and one past the last key block
            that is whole; the same for those that are seen at all; queries that count; 1 if all
            queries are padding; 1 if a query sees nothing but in whole blocks; unused.
        keys_per_block: Real keys, int32 ``[B, C]``.
        first: First row and first column of blocks with a real token, int32 ``[B, 2]``.
        key_valid: 0 for padding, uint8 ``[B, M]``; None: all real.
        query_pooled: 1 for queries that count in block means, uint8 ``[B, N]``; None: all.
    """

    intervals: Tensor
    rows: Tensor
    keys_per_block: Tensor
    first: Tensor
    key_valid: Tensor | None
    query_pooled: Tensor | None


class RowCosts(NamedTuple):
    """What rows of blocks are worth and what the mask spends of that.

    Attributes:
        entries: Legal entries, int64 ``[B, R]``.
        cut_entries, cut_blocks: Those in blocks that are cut through, and such blocks, int64.
        padding: All queries are padding, bool ``[B, R]``.
    """

    entries: Tensor
    cut_entries: Tensor
    cut_blocks: Tensor
    padding: Tensor

    def budgets(self, config: MraAttentionConfig) -> Tensor:
        """What is left for whole pairs once those that are cut through are paid for, in entries
        or, with ``blocks_per_row``, in blocks: int64 ``[B, R]`` for rows, and ``[B, 2]`` for a head
        (its real rows, and those that are padding). Negative: nothing."""
        if config.blocks_per_row is not None:
            worth, spent = config.blocks_per_row * (self.entries > 0).long(), self.cut_blocks
        else:
            worth, spent = self.entries, self.cut_entries
        if config.scope == "head":
            worth, spent = (
                torch.stack([(x * ~self.padding).sum(1), (x * self.padding).sum(1)], 1)
                for x in (worth, spent)
            )
        if config.blocks_per_row is None:
            worth = (config.area(0) * worth.double() + 1e-6).long()
        return (worth - spent).contiguous()


def mask_tables(mask: AttentionMask, config: MraAttentionConfig) -> tuple[MaskTables, Tensor]:
    """Of a mask without a matrix, and `RowCosts.budgets`; kept in the mask."""
    shape, rule = config.block_shapes[0], (config.budget, config.blocks_per_row, config.scope)
    tables, costs = tables_of(mask, *shape)
    return tables, mask.kept(("budgets", shape, rule), lambda: costs.budgets(config))


def tables_of(mask: AttentionMask, query_rows: int, side: int) -> tuple[MaskTables, RowCosts]:
    """Of a mask without a matrix; kept in the mask."""
    return mask.kept(("tables", query_rows, side), lambda: _tables(mask, query_rows, side))


def _tables(mask: AttentionMask, query_rows: int, side: int) -> tuple[MaskTables, RowCosts]:
    legal = mask.legal_per_row()
    batch, m = legal.shape[0], mask.n_keys
    if mask.query_valid is not None:
        batch = max(batch, mask.query_valid.shape[0])
    legal = legal.expand(batch, -1)
    seen = legal > 0
    start, stop = (x.expand(batch, -1) * seen for x in (mask.start, mask.stop.clamp(max=m)))
    counts = seen | True if mask.query_valid is None else seen | mask.query_valid

    def rows_of(values: Tensor, chosen: Tensor, other: int) -> Tensor:
        return _in_blocks(values.masked_fill(~chosen, other), query_rows, other)

    queries = rows_of(counts.long(), counts, 0).sum(-1)
    # Not m, which is no constant for torch.compile.
    inner = rows_of(start, counts, 0).amax(-1), rows_of(stop, counts, END).amin(-1).clamp(max=m)
    outer = rows_of(start, seen, END).amin(-1).clamp(max=m), rows_of(stop, seen, 0).amax(-1)
    entries = rows_of(legal, seen, 0).sum(-1)

    valid = mask.key_valid
    real = torch.ones(1, m, dtype=torch.int64, device=legal.device) if valid is None else valid
    before = pad(real.long().cumsum(-1), (1, 0)).expand(batch, -1)
    per_block = _in_blocks(real.long(), side, 0).sum(-1).expand(batch, -1)

    def between(low: Tensor, high: Tensor) -> Tensor:
        low, high = (x.clamp(0, m) for x in (low, high))
        return (before.gather(1, high) - before.gather(1, low)).clamp(min=0)

    (lo, hi), (first, last) = inner, outer
    # A block at the edge of a run belongs to it if no real key lies on the wrong side.
    whole_first = lo // side + (between(lo // side * side, lo) > 0)
    whole_stop = -(-hi // side) - (between(hi, -(-hi // side) * side) > 0).long()
    whole_stop = torch.maximum(whole_stop * (queries > 0), whole_first)
    seen_first = first // side + (between(first, (first // side + 1) * side) == 0)
    seen_stop = -(-last // side) - (between((-(-last // side) - 1) * side, last) == 0).long()
    seen_stop = torch.maximum(seen_stop * (entries > 0), seen_first)

    whole_keys = between(whole_first * side, whole_stop * side)
    blocks_before = pad((per_block > 0).long().cumsum(-1), (1, 0))
    n_blocks = per_block.shape[1]

    def blocks(low: Tensor, high: Tensor) -> Tensor:
        low, high = (x.clamp(0, n_blocks) for x in (low, high))
        return blocks_before.gather(1, high) - blocks_before.gather(1, low)

    only_whole = seen & (legal == each_row(whole_keys[:, None], legal[:, None], query_rows)[:, 0])
    padding = mask.padding_rows(query_rows, batch)
    facts = (
        *(whole_first, whole_stop, seen_first, seen_stop, queries, padding),
        rows_of(only_whole.long(), only_whole, 0).amax(-1),
        torch.zeros_like(queries),
    )
    query_pooled, _ = mask.pooled_tokens(query_rows)
    tables = MaskTables(
        torch.stack([start, stop], -1).int(),
        torch.stack([x.int() for x in facts], -1),
        per_block.int().contiguous(),
        torch.stack([(~padding).int().argmax(1), (per_block > 0).int().argmax(1)], 1).int(),
        *(
            None if x is None else x.expand(batch, -1).to(torch.uint8).contiguous()
            for x in (valid, query_pooled)
        ),
    )
    costs = RowCosts(
        entries,
        entries - queries * whole_keys,
        blocks(seen_first, seen_stop) - blocks(whole_first, whole_stop),
        padding,
    )
    return tables, costs


def _in_blocks(values: Tensor, side: int, fill: int) -> Tensor:
    """``[B, n]`` as ``[B, blocks, side]``."""
    blocks = (values.shape[1] + side - 1) // side
    padded = pad(values, (0, blocks * side - values.shape[1]), value=fill)
    return padded.unflatten(1, (blocks, side))
