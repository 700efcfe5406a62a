"""From pooled scores to the plan of one call: which block pairs are exact, which stay pooled.

The greedy refinement of arXiv 2207.10284 (Algorithm 1), extended to masks: block pairs the mask
cuts through are always refined, since one pooled score can't honour the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.pyramid import take_blocks
from mra_kernels.scores import ScoreRule, gather_bias

_FIRST = 1e6
"""Added to the score of favoured pairs, in float64: more than any logit, and harmless to ties."""


_PAIRS_AT_ONCE = 1 << 18
"""Pairs whose pooled vectors are gathered at a time: a few hundred MB."""


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """Pairs of a query block and a key block, sorted by head, then row, then column.

    Attributes:
        query_rows, side: Queries and keys per block.
        head: Batch index times query heads plus query head, int64 ``[P]``.
        row, col: Query block and key block, int64 ``[P]``.
        legal: Unmasked entries, int64 ``[P]``.
        logit: Pooled score with scaling, soft-cap and bias applied, ``[P]``; differentiable.
    """

    query_rows: int
    side: int
    head: Tensor
    row: Tensor
    col: Tensor
    legal: Tensor
    logit: Tensor

    def __len__(self) -> int:
        return self.head.numel()

    def take(self, index: Tensor) -> BlockPairs:
        """The pairs at ``index`` (positions, or a boolean choice)."""
        parts = (self.head, self.row, self.col, self.legal, self.logit)
        return BlockPairs(self.query_rows, self.side, *(part[index] for part in parts))

    def of_first_heads(self, first: int, heads: int) -> BlockPairs:
        """The pairs of the ``first`` of ``heads`` heads of each batch entry, numbered as if there
        were no others."""
        kept = self.take(self.head % heads < first)
        return replace(kept, head=kept.head // heads * first + kept.head % heads)


@dataclass(frozen=True, eq=False)
class Selection:
    """The plan of one call. ``fine`` and ``coarse`` together tile the legal entries exactly once.

    What is costly to list is worked out when asked for.

    Attributes:
        figures: Makes `density`, `forced` and `dot_products`.
        pairs: Makes `fine` and `coarse`, of so many first heads of each batch entry, or of all.
    """

    figures: Callable[[], tuple[Tensor, Tensor, int]]
    pairs: Callable[[int | None], tuple[BlockPairs, tuple[BlockPairs, ...]]]

    @cached_property
    def _figures(self) -> tuple[Tensor, Tensor, int]:
        return self.figures()

    @cached_property
    def _pairs(self) -> tuple[BlockPairs, tuple[BlockPairs, ...]]:
        return self.pairs(None)

    @property
    def density(self) -> Tensor:
        """Exact entries / legal entries, padding rows left out, ``[B, H]``."""
        return self._figures[0]

    @property
    def forced(self) -> Tensor:
        """The part of the density that the mask (and, without a coarse term, rows that would see
        nothing) demands whatever the budget, ``[B, H]``."""
        return self._figures[1]

    @property
    def dot_products(self) -> int:
        """Pooled and exact scores evaluated, over all heads."""
        return self._figures[2]

    @property
    def fine(self) -> BlockPairs:
        """Pairs computed entry by entry."""
        return self._pairs[0]

    @property
    def coarse(self) -> tuple[BlockPairs, ...]:
        """Pairs left at a pooled score, one group per resolution; empty for coarse="none"."""
        return self._pairs[1]

    def first_heads(self, heads: int) -> Selection:
        """The plan of the first heads of each batch entry alone; its figures stay those of all."""
        return replace(self, pairs=lambda _: self.pairs(heads))

    def rescored(
        self,
        queries: dict[int, Tensor],
        keys: dict[int, Tensor],
        mask: AttentionMask,
        rule: ScoreRule,
    ) -> Selection:
        """The same blocks with the scores of other tokens. Arguments as in `select_blocks`."""
        fine, coarse = (
            [
                replace(p, logit=pair_logits(p, queries[p.query_rows], keys[p.side], mask, rule))
                for p in group
            ]
            for group in ([self.fine], self.coarse)
        )
        return replace(self, pairs=lambda _: (fine[0], tuple(coarse)))


def select_blocks(
    queries: dict[int, Tensor],
    keys: dict[int, Tensor],
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
) -> Selection:
    """Choose the block pairs to compute exactly. Deterministic: ties go to the lower index.

    Args:
        queries: Pooled queries by rows of a block, ``[B, H, N / rows, D]``.
        keys: Pooled keys by side of a block, ``[B, Hkv, M / side, D]``.
        mask: Who may see whom.
        config: Resolutions, budget, priors, ranking.
        rule: Turns dot products of pooled vectors into logits.
    """
    shapes = config.block_shapes
    rows = shapes[0][0]
    batch_size, heads = queries[rows].shape[:2]
    padding = mask.padding_rows(rows, batch_size)

    def per_head(pairs: BlockPairs, entries: Tensor) -> Tensor:
        real = ~padding[pairs.head // heads, pairs.row * pairs.query_rows // rows]
        zeros = torch.zeros(batch_size * heads, dtype=torch.int64, device=entries.device)
        return zeros.index_add(0, pairs.head, entries * real)

    pairs = _coarsest(queries, keys, mask, rule, *shapes[0])
    total = per_head(pairs, pairs.legal)
    coarse = []
    dots = len(pairs)
    for step, (query_rows, side) in enumerate(shapes):
        n_queries, n_keys = mask.block_sizes(side, batch_size, query_rows)
        batch = pairs.head // heads
        cut = pairs.legal < n_queries[batch, pairs.row] * n_keys[batch, pairs.col]
        rank = 2 * cut + _favoured(pairs, mask, config, heads, batch_size)
        # Padding rows get their share of the budget apart, so as not to compete with real ones.
        apart = padding.repeat_interleave(rows // query_rows, dim=1)
        opened = _open(pairs, rank, mask, config, step, apart, heads) | cut
        forced = cut
        if config.coarse == "none":
            rescued = _rescue(pairs, opened, mask, heads)
            opened, forced = opened | rescued, forced | rescued
        else:
            coarse.append(pairs.take(~opened))
        forced_entries = per_head(pairs, pairs.legal * forced)
        pairs, cut = pairs.take(opened), cut[opened]
        if step + 1 < len(shapes):
            finer = shapes[step + 1][1]
            pairs = _children(pairs, cut, queries[finer], keys[finer], mask, rule, finer)
            dots += len(pairs)
    exact = per_head(pairs, pairs.legal)
    dots += int(exact.sum())
    if config.coarse == "per_query":
        dots += sum(len(level) * level.query_rows for level in coarse)
    density = (exact / total.clamp(min=1)).view(batch_size, heads)
    forced_density = (forced_entries / total.clamp(min=1)).view(batch_size, heads)

    def listed(first: int | None) -> tuple[BlockPairs, tuple[BlockPairs, ...]]:
        if first is None:
            return pairs, tuple(coarse)
        groups = [group.of_first_heads(first, heads) for group in (pairs, *coarse)]
        return groups[0], tuple(groups[1:])

    return Selection(lambda: (density, forced_density, dots), listed)


def pair_logits(
    pairs: BlockPairs, queries: Tensor, keys: Tensor, mask: AttentionMask, rule: ScoreRule
) -> Tensor:
    """Pooled score of each pair, ``[P]``, from the pooled tokens of its blocks."""
    heads, per_kv = queries.shape[1], queries.shape[1] // keys.shape[1]
    bias = rule.block_bias(mask, pairs.side, pairs.query_rows)
    logits = []
    for place in torch.arange(len(pairs), device=pairs.head.device).split(_PAIRS_AT_ONCE):
        head, row, col = pairs.head[place], pairs.row[place], pairs.col[place]
        q = take_blocks(queries.flatten(0, 1), head, row)
        k = take_blocks(keys.flatten(0, 1), head // per_kv, col)
        own = gather_bias(bias, head // heads, head % heads, row, col)
        logits.append(rule.logits((q * k).sum(-1), own))
    return torch.cat(logits)


def _coarsest(
    queries: dict[int, Tensor],
    keys: dict[int, Tensor],
    mask: AttentionMask,
    rule: ScoreRule,
    query_rows: int,
    side: int,
) -> BlockPairs:
    """All pairs at the coarsest resolution that hold a legal entry."""
    q, k = queries[query_rows], keys[side]
    (batch_size, heads, n_rows, _), (_, kv_heads, n_cols, _) = q.shape, k.shape
    device = q.device
    dots = q.unflatten(1, (kv_heads, -1)) @ k[:, :, None].transpose(-1, -2)
    bias = rule.block_bias(mask, side, query_rows)
    logits = rule.logits(dots.flatten(1, 2), bias)
    index = torch.arange(batch_size * n_rows * n_cols, device=device)
    batch, place = index // (n_rows * n_cols), index % (n_rows * n_cols)
    legal = mask.tile_counts(batch, place // n_cols, place % n_cols, side, query_rows)
    legal = legal.view(batch_size, 1, n_rows, n_cols).expand(-1, heads, -1, -1)
    b, h, row, col = legal.nonzero(as_tuple=True)
    chosen = legal[b, h, row, col], logits[b, h, row, col]
    return BlockPairs(query_rows, side, b * heads + h, row, col, *chosen)


def _children(
    parents: BlockPairs,
    cut: Tensor,
    queries: Tensor,
    keys: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    side: int,
) -> BlockPairs:
    """The square pairs of ``side`` inside square ``parents`` that hold a legal entry, scored.

    ``cut`` says which parents the mask cuts through; children of the others are whole.
    """
    (batch_size, heads), kv_heads = queries.shape[:2], keys.shape[1]
    ratio = parents.side // side
    inner = torch.arange(ratio, device=parents.head.device)
    kv_head = parents.head // (heads // kv_heads)
    q = take_blocks(queries.flatten(0, 1).unflatten(1, (-1, ratio)), parents.head, parents.row)
    k = take_blocks(keys.flatten(0, 1).unflatten(1, (-1, ratio)), kv_head, parents.col)
    shape = (len(parents), ratio, ratio)
    head = parents.head[:, None, None].expand(shape)
    row = (parents.row[:, None] * ratio + inner)[:, :, None].expand(shape)
    col = (parents.col[:, None] * ratio + inner)[:, None].expand(shape)
    n_queries, n_keys = _whole_sizes(mask, side, batch_size, queries.shape[2], keys.shape[2])
    batch = (parents.head // heads)[:, None, None]
    legal = n_queries[batch, row] * n_keys[batch, col]
    b, i, j = (x[cut].flatten() for x in (batch.expand(shape), row, col))
    legal[cut] = mask.tile_counts(b, i, j, side).view(-1, ratio, ratio)

    # Parents come sorted; where each child goes can be told without sorting again.
    run = (parents.head * queries.shape[2] + parents.row).unique_consecutive(return_counts=True)[1]
    run_length = run.repeat_interleave(run)
    run_start = (run.cumsum(0) - run).repeat_interleave(run)
    in_run = torch.arange(len(parents), device=run.device) - run_start
    base = run_start * ratio * ratio + in_run * ratio
    place = base[:, None, None] + inner[:, None] * (run_length * ratio)[:, None, None] + inner
    order = torch.empty_like(place).flatten()
    order[place.flatten()] = torch.arange(place.numel(), device=place.device)
    order = order[legal.flatten()[order] > 0]

    head, row, col, legal = (x.reshape(-1)[order] for x in (head, row, col, legal))
    dots = (q @ k.transpose(-1, -2)).flatten()[order]
    bias = rule.block_bias(mask, side, side)
    logits = rule.logits(dots, gather_bias(bias, head // heads, head % heads, row, col))
    return BlockPairs(side, side, head, row, col, legal, logits)


def _whole_sizes(
    mask: AttentionMask, side: int, batch_size: int, rows: int, cols: int
) -> tuple[Tensor, Tensor]:
    """`AttentionMask.block_sizes`, with blocks beyond the last token of size 0."""
    n_queries, n_keys = mask.block_sizes(side, batch_size)
    pad = torch.nn.functional.pad
    return (
        pad(n_queries, (0, rows - n_queries.shape[1])),
        pad(n_keys, (0, cols - n_keys.shape[1])),
    )


def _favoured(
    pairs: BlockPairs, mask: AttentionMask, config: MraAttentionConfig, heads: int, batch_size: int
) -> Tensor:
    """Pairs the configured priors put first, at every step in blocks of that step."""
    favoured = torch.zeros_like(pairs.legal, dtype=torch.bool)
    batch, rows, side = pairs.head // heads, pairs.query_rows, pairs.side
    if config.first_blocks:
        # Left padding moves the 'first' block to the first one that holds a real token.
        _, real_keys = mask.block_sizes(side, batch_size)
        first_row = (~mask.padding_rows(rows, batch_size)).int().argmax(1)[batch]
        first_col = (real_keys > 0).int().argmax(1)[batch]
        # With a cache, rows count on from where it ends.
        earlier = mask.query_offset // rows
        favoured |= pairs.row + earlier < first_row + config.first_blocks
        favoured |= pairs.col < first_col + config.first_blocks
    if config.diagonal_blocks:
        # The diagonal runs through as many blocks of a row as are as wide as it is high.
        own = (pairs.row * rows + mask.query_offset) // side
        reach = config.diagonal_blocks // 2
        favoured |= (pairs.col >= own - reach) & (pairs.col < own + rows // side + reach)
    return favoured


def _open(
    pairs: BlockPairs,
    rank: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    step: int,
    padding: Tensor,
    heads: int,
) -> Tensor:
    """The best pairs of each segment that its budget pays for.

    A segment is a head, in two parts (real rows and padding rows), or a row of blocks.
    """
    legal = mask.block_row_entries(pairs.query_rows, padding.shape[0])
    padding = padding[:, : legal.shape[1]].repeat_interleave(heads, dim=0)
    legal = legal.repeat_interleave(heads, dim=0)
    row = pairs.head * legal.shape[1] + pairs.row
    if config.blocks_per_row is not None:
        cost, worth = torch.ones_like(pairs.legal), config.blocks_per_row * (legal > 0).long()
    else:
        cost, worth = pairs.legal, legal
    if config.scope == "row":
        segment, budget = row, worth.flatten()
    else:
        segment = 2 * pairs.head + padding.flatten()[row]
        budget = torch.stack([(worth * ~padding).sum(1), (worth * padding).sum(1)], 1).flatten()
    if config.blocks_per_row is None:
        budget = (config.area(step) * budget.double() + 1e-6).long()

    score = pairs.logit.detach()
    if config.score == "row":
        best = score.new_full((legal.numel(),), -torch.inf).scatter_reduce(0, row, score, "amax")
        score = score - best[row]
    return _affordable(score.double() + _FIRST * rank, cost, segment, budget)


def _affordable(score: Tensor, cost: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    """The highest scores of each segment whose costs add up to at most its budget, bool ``[P]``.

    Ties go to the lower index. Segments are sorted side by side, as rows of a matrix.
    """
    order = torch.arange(len(segment), device=segment.device)
    if bool((segment[1:] < segment[:-1]).any()):
        order = segment.argsort(stable=True)
    present, length = segment[order].unique_consecutive(return_counts=True)
    begin = length.cumsum(0) - length
    place = torch.arange(int(length.max()) if len(length) else 0, device=segment.device)
    real = place < length[:, None]
    index = order[(begin[:, None] + place) * real]
    ranked = (
        score[index].masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    )
    spent = (cost[index] * real).gather(1, ranked).cumsum(1)
    taken = (spent <= budget[present, None]) & real.gather(1, ranked)
    opened = torch.zeros_like(segment, dtype=torch.bool)
    opened[index.gather(1, ranked)[taken]] = True
    return opened


def _rescue(pairs: BlockPairs, opened: Tensor, mask: AttentionMask, heads: int) -> Tensor:
    """The best unopened pair of each row of blocks in which some row would see no key at all."""
    batch, shape = pairs.head // heads, (pairs.side, pairs.query_rows)
    n_rows = -(-mask.n_queries // pairs.query_rows)
    row = pairs.head * n_rows + pairs.row
    size = (int(pairs.head.max()) + 1) * n_rows if len(pairs) else 0
    seen = torch.zeros(size, pairs.query_rows, dtype=torch.int64, device=row.device)
    chosen = opened.nonzero()[:, 0]
    counts = mask.tile_row_counts(batch[chosen], pairs.row[chosen], pairs.col[chosen], *shape)
    seen.index_add_(0, row[chosen], counts)
    left = (~opened).nonzero()[:, 0]
    counts = mask.tile_row_counts(batch[left], pairs.row[left], pairs.col[left], *shape)
    useful = left[((counts > 0) & (seen[row[left]] == 0)).any(1)]
    score = pairs.logit.detach()[useful]
    order = score.argsort(descending=True, stable=True)
    order = order[row[useful][order].argsort(stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    ordered_rows = row[useful][order]
    first[1:] = ordered_rows[1:] != ordered_rows[:-1]
    rescued = torch.zeros_like(opened)
    rescued[useful[order[first]]] = True
    return rescued
