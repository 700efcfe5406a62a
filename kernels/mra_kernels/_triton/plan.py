"""What the kernels are asked, what they chose, and that as a `Selection`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import BlockPairs, Selection, pair_logits


class Settings(NamedTuple):
    """A config of two resolutions and a score rule, in numbers that an operator of torch takes.

    Attributes:
        query_rows, side: Queries and keys per block.
        coarse: ``none``, ``pooled`` or ``per_query``.
        less_best: Scores are less the best of their row of blocks.
        by_row: Each row of blocks has its own budget.
        by_count: Budgets are in blocks.
        first_blocks, diagonal_blocks: Priors.
        offset: Position of query 0 among the keys.
        scaling, softcap: As in `ScoreRule`.
    """

    query_rows: int
    side: int
    coarse: str
    less_best: bool
    by_row: bool
    by_count: bool
    first_blocks: int
    diagonal_blocks: int
    offset: int
    scaling: float
    softcap: float | None

    @classmethod
    def of(cls, config: MraAttentionConfig, rule: ScoreRule, offset: int) -> Settings:
        """Without the budget, which is a tensor."""
        return cls(
            *config.block_shapes[0],
            config.coarse,
            config.score == "row",
            config.scope == "row",
            config.blocks_per_row is not None,
            config.first_blocks,
            config.diagonal_blocks,
            offset,
            float(rule.scaling),
            rule.softcap,
        )


class Plan(NamedTuple):
    """What is opened, and the softmax over what is not, for batch times heads ``G``.

    Attributes:
        opened: A bit per pair of blocks, lowest first, int32 ``[G, R, ceil(C / 32)]``.
        rescued: Columns opened for queries that would see nothing else, -1 for none, int32
            ``[G, R]``; None if there is a coarse term.
        peak, mass, weighted: For ``coarse="pooled"``, float32 ``[G, R]``, ``[G, R]`` and
            ``[G, R, Dv]``: base-2 peak, sum of ``exp2(logit - peak)``, and that weighted by values.
    """

    opened: Tensor
    rescued: Tensor | None
    peak: Tensor | None
    mass: Tensor | None
    weighted: Tensor | None


def bits_of(words: Tensor, count: int) -> Tensor:
    """Bits of int32 words ``[..., W]``, lowest first, bool ``[..., count]``."""
    each = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> each) & 1).bool().flatten(-2)[..., :count]


def selection_of(
    opened: Tensor,
    rescued: Tensor | None,
    q_means: Tensor,
    k_means: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
) -> Selection:
    """The plan as other implementations tell it, worked out when asked for.

    Args:
        opened, rescued: See `Plan`.
        q_means, k_means: Block means, ``[B, H, R, D]`` and ``[B, Hkv, C, D]``.
    """
    (batch, heads, rows, _), (kv_heads, cols) = q_means.shape, k_means.shape[1:3]
    query_rows, side = config.block_shapes[0]

    def legal() -> Tensor:
        index = torch.arange(batch * rows * cols, device=opened.device)
        b, place = index // (rows * cols), index % (rows * cols)
        return mask.tile_counts(b, place // cols, place % cols, side, query_rows).view(
            batch, rows, cols
        )

    def figures() -> tuple[Tensor, Tensor, int]:
        entries = legal()
        n_queries, n_keys = mask.block_sizes(side, batch, query_rows)
        cut = (entries < n_queries[:, :, None] * n_keys[:, None]) & (entries > 0)
        chosen = bits_of(opened, cols).view(batch, heads, rows, cols)
        real = entries * ~mask.padding_rows(query_rows, batch)[:, :, None]
        forced = cut[:, None].expand_as(chosen)
        if rescued is not None:
            saved = rescued.view(batch, heads, rows, 1).long()
            forced = forced.scatter(-1, saved.clamp(min=0), saved >= 0) | forced
        exact = (chosen * real[:, None]).sum()
        dots = heads * int((entries > 0).sum()) + int(exact)
        if config.coarse == "per_query":
            dots += query_rows * int(((entries > 0)[:, None] & ~chosen).sum())
        total = real.sum((1, 2)).clamp(min=1)[:, None]
        density, floor = ((x * real[:, None]).sum((2, 3)) / total for x in (chosen, forced))
        return density, floor, dots

    def pairs(first: int | None) -> tuple[BlockPairs, tuple[BlockPairs, ...]]:
        kept = heads if first is None else first
        queries, keys = q_means[:, :kept], k_means[:, : max(1, kept * kv_heads // heads)]
        entries = legal()[:, None].expand(-1, kept, -1, -1).flatten(0, 1)
        chosen = bits_of(opened, cols).view(batch, heads, rows, cols)[:, :kept].flatten(0, 1)

        def listed(which: Tensor) -> BlockPairs:
            head, row, col = (which & (entries > 0)).nonzero(as_tuple=True)
            legal, unknown = entries[head, row, col], queries.new_empty(0)
            bare = BlockPairs(query_rows, side, head, row, col, legal, unknown)
            return replace(bare, logit=pair_logits(bare, queries, keys, mask, rule))

        coarse = () if config.coarse == "none" else (listed(~chosen),)
        return listed(chosen), coarse

    return Selection(figures, pairs)
