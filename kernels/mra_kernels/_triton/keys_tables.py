"""What the kernels for single keys are told of tokens and mask, in torch: O(N + M) numbers.

A block of queries sees keys of one run, and all its rows see every real key of a run inside that:
those keys are whole, the others are cut by the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mra_kernels._triton import tuning
from mra_kernels._triton.mask_tables import END
from mra_kernels.config import MraKeysConfig
from mra_kernels.features import ByteFeatures
from mra_kernels.masks import AttentionMask


class KeyTables(NamedTuple):
    """A mask and blocks of queries, for a batch of ``B``, or 1 if all entries share it.

    Attributes:
        intervals: As in `MaskTables`, int32 ``[B, N, 2]``.
        rows: As in `MaskTables` with keys for blocks of keys, int32 ``[B, R, 8]``: first and one
            past the last key that is whole; the same for those that are seen at all; rows that see
            anything; 1 if all are padding; unused.
        first_key: The first real key, int32 ``[B]``.
        key_valid: 0 for padding, uint8 ``[B, M]``; None: all real.
        counted: 1 for queries that speak for their block, uint8 ``[B, N]``; None: all.
    """

    intervals: Tensor
    rows: Tensor
    first_key: Tensor
    key_valid: Tensor | None
    counted: Tensor | None


class KeyCosts(NamedTuple):
    """What blocks of queries are worth, and what the mask spends of that.

    Attributes:
        entries: Legal entries, int64 ``[B, R]``.
        cut_entries: Those of keys that are cut by the mask, int64 ``[B, R]``.
        whole_keys: Real keys that are whole, int64 ``[B, R]``.
        live: Rows that see anything, int64 ``[B, R]``.
        padding: All rows are padding, bool ``[B, R]``.
    """

    entries: Tensor
    cut_entries: Tensor
    whole_keys: Tensor
    live: Tensor
    padding: Tensor

    def budgets(self, shares: tuple[float, ...]) -> Tensor:
        """What is left for whole keys once those that are cut are paid for, in entries, int64
        ``[B, H, 2]``: for the real blocks of each head, and for those of padding."""
        parts = torch.stack([~self.padding, self.padding], 1)
        worth, spent = (
            (x[:, None] * parts).sum(2) for x in (self.entries, self.cut_entries)
        )  # [B, 2]
        each = {share: (share * worth.double() + 1e-6).long() - spent for share in set(shares)}
        return torch.stack([each[share] for share in shares], 1)


def key_facts(
    query: Tensor, key: Tensor, mask: AttentionMask, config: MraKeysConfig, scaling: float
) -> tuple[list[Tensor], KeyTables, Tensor]:
    """Features, tables and `KeyCosts.budgets`, as `keys_forward` takes them; what is said of the
    mask, which has no matrix, is kept in it."""
    rows, shares = config.rows, config.budget_of_heads(query.shape[1])
    tables, costs = tables_of(mask, rows)
    budgets = mask.kept(("key_budgets", rows, shares), lambda: costs.budgets(shares))
    return _features(query, key, mask, config, scaling), tables, budgets


def _features(
    query: Tensor, key: Tensor, mask: AttentionMask, config: MraKeysConfig, scaling: float
) -> list[Tensor]:
    """In float32 whatever autocast says."""
    with torch.autocast("cuda" if query.is_cuda else "cpu", enabled=False):
        made = ByteFeatures.of(query.float(), key.float(), mask, config, scaling)
    wide = (0, padded_rank(made.key.shape[-1]) - made.key.shape[-1])
    return [*(pad(x.to(torch.int8), wide).contiguous() for x in (made.query, made.key)), made.unit]


def padded_rank(rank: int) -> int:
    """Features are padded to so many: products of bytes take 32 at least."""
    return max(32, tuning.padded(rank))


def tables_of(mask: AttentionMask, rows: int) -> tuple[KeyTables, KeyCosts]:
    """Of a mask without a matrix; kept in the mask."""
    return mask.kept(("key_tables", rows), lambda: _tables(mask, rows))


def _tables(mask: AttentionMask, rows: int) -> tuple[KeyTables, KeyCosts]:
    legal = mask.legal_per_row()
    batch, n, m = legal.shape[0], mask.n_queries, mask.n_keys
    if mask.query_valid is not None:
        batch = max(batch, mask.query_valid.shape[0])
    legal = legal.expand(batch, -1)
    seen = legal > 0
    start, stop = (x.expand(batch, -1) * seen for x in (mask.start, mask.stop.clamp(max=m)))

    def blocks(values: Tensor, other: int) -> Tensor:
        values = values.masked_fill(~seen, other)
        return pad(values, (0, -n % rows), value=other).unflatten(1, (-1, rows))

    live, entries = blocks(seen.long(), 0).sum(-1), blocks(legal, 0).sum(-1)
    # Not m, which is no constant for torch.compile.
    whole_first, whole_stop = blocks(start, 0).amax(-1), blocks(stop, END).amin(-1).clamp(max=m)
    whole_stop = torch.maximum(whole_stop * (live > 0), whole_first)
    seen_first, seen_stop = blocks(start, END).amin(-1), blocks(stop, 0).amax(-1)
    seen_first = torch.minimum(seen_first, seen_stop)

    whole_keys = whole_stop - whole_first
    first_key = torch.zeros(batch, dtype=torch.int64, device=legal.device)
    if mask.key_valid is not None:
        valid = mask.key_valid.expand(batch, -1)
        before = pad(valid.long().cumsum(-1), (1, 0))
        whole_keys = before.gather(1, whole_stop) - before.gather(1, whole_first)
        first_key = valid.int().argmax(1)
    padding = mask.padding_rows(rows, batch)
    nothing = torch.zeros_like(live)
    facts = whole_first, whole_stop, seen_first, seen_stop, live, padding, nothing, nothing
    counted, _ = mask.pooled_tokens(rows)
    tables = KeyTables(
        torch.stack([start, stop], -1).int(),
        torch.stack([x.int() for x in facts], -1),
        first_key.int(),
        *(
            None if x is None else x.expand(batch, -1).to(torch.uint8).contiguous()
            for x in (mask.key_valid, counted)
        ),
    )
    return tables, KeyCosts(entries, entries - live * whole_keys, whole_keys, live, padding)
