"""Attention whose blocks of queries open single keys, in plain torch (`MraKeysConfig`).

The specification every other implementation is held to. Any float dtype (half types are computed
in float32, float64 stays float64), any device, autograd; as much work as exact attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mra_kernels.config import MraKeysConfig
from mra_kernels.features import ByteFeatures
from mra_kernels.masks import AttentionMask
from mra_kernels.pyramid import counted_means, each_row, tiled_rows
from mra_kernels.reference import SoftmaxPart, for_blind_rows
from mra_kernels.scores import ScoreRule

FARTHEST = 127
"""Distances are whole steps from 0, for favoured keys, to this."""

STEPS_PER_NAT = 8

APART = 8
"""Log-sum-exps take every so many-th key, for so many, but where keys count singly."""

_CHUNK, _CLOSE = 64, 32
"""Keys count singly in chunks of so many that hold the first key, or one so close to the block."""

_SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class KeyChoice:
    """The plan of one call: the keys that each block of queries opened.

    Attributes:
        rows: Queries per block.
        opened: Makes the choice, bool ``[B, H, blocks, M]``.
        figures: Makes `density`, `forced`, and the counts of entries computed exactly, of keys
            left behind (over all blocks), and of entries estimated.
    """

    rows: int
    opened: Callable[[], Tensor]
    figures: Callable[[], tuple[Tensor, Tensor, int, int, int]]

    @cached_property
    def _figures(self) -> tuple[Tensor, Tensor, int, int, int]:
        return self.figures()

    @property
    def density(self) -> Tensor:
        """Exact entries / legal entries, padding rows left out, ``[B, H]``."""
        return self._figures[0]

    @property
    def forced(self) -> Tensor:
        """The part of the density that the mask demands whatever the budget, ``[B, H]``."""
        return self._figures[1]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Entries computed exactly, keys left behind over all blocks, entries estimated."""
        return self._figures[2:]

    def first_heads(self, heads: int) -> KeyChoice:
        """The plan of the first heads of each batch entry alone; its figures stay those of all."""
        return replace(self, opened=lambda: self.opened()[:, :heads])


def keys_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
    choice: KeyChoice | None = None,
) -> tuple[Tensor, Tensor, KeyChoice]:
    """Attention with opened keys exact. Arguments and results as in `mra_reference`.

    Args:
        choice: The keys to open; None: choose them.
    """
    batch_size, heads, _n_queries, _ = query.shape
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype) for x in (query, key, value))
    rows = config.rows
    if choice is None:
        with torch.no_grad():
            choice = choose_keys(q, k, mask, config, rule)
    opened = choice.opened()
    per_kv = heads // key.shape[1]
    k, v = (x.repeat_interleave(per_kv, 1) if per_kv > 1 else x for x in (k, v))
    outputs, masses = [], []
    for block in _query_blocks(mask, rows, batch_size, heads * key.shape[2]):
        tiles = slice(block.first // rows, -(-block.last // rows))
        own = q[:, :, block.first : block.last]
        fine = _opened_part(own, k, v, block, each_row(opened[:, :, tiles], own, rows), rule)
        mean = counted_means(own, block.counted, rows)
        left = (block.whole[:, None] & ~opened[:, :, tiles]).expand(-1, heads, -1, -1)
        tail = _tail_part(own, mean, k, v, left, block, config, rule)
        total = fine.merge(tail)
        if sinks is not None:
            logits = sinks.to(dtype).view(1, heads, 1).expand_as(total.peak)
            ones = torch.exp(logits - logits.detach())
            total = total.merge(SoftmaxPart(logits.detach(), ones, total.weighted * 0))
        outputs.append(total.weighted / total.mass.masked_fill(total.mass == 0, 1.0)[..., None])
        masses.append(fine.peak + fine.mass.log())
    output = for_blind_rows(torch.cat(outputs, 2), value.to(dtype), mask, sinks)
    return output.to(value.dtype), torch.cat(masses, 2), choice


def choose_keys(
    query: Tensor, key: Tensor, mask: AttentionMask, config: MraKeysConfig, rule: ScoreRule
) -> KeyChoice:
    """The keys each block of queries opens, nearest first until the budget of its head is spent.

    Keys that the mask hides from some rows of a block alone are always opened. Blocks of padding
    rows have a budget of their own. Ties go to the lower index.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, Hkv, M, D]``.
    """
    batch_size, heads, _n_queries, _ = query.shape
    rows = config.rows
    features = ByteFeatures.of(query, key, mask, config, rule.scaling)
    parts, whole, some, live = [], [], [], []
    for block in _query_blocks(mask, rows, batch_size, heads * key.shape[2]):
        tiles = _distances(features, block, mask, config, rule)
        parts.append(tiles)
        whole.append(block.whole)
        some.append(block.seen)
        live.append(block.live)
    distance, is_whole, seen = torch.cat(parts, 2), torch.cat(whole, 1), torch.cat(some, 1)
    cost = torch.cat(live, 1).expand(batch_size, -1)  # rows of each block that see anything
    cut = (seen > 0) & ~is_whole
    padding = mask.padding_rows(rows, batch_size)
    opened = cut[:, None].expand(batch_size, heads, -1, -1).clone()
    for b in range(batch_size):
        for h, share in enumerate(config.budget_of_heads(heads)):
            for of_padding in (False, True):
                mine = padding[b] if of_padding else ~padding[b]
                entries, hidden = seen[b % len(seen)][mine], cut[b % len(cut)][mine]
                budget = int(share * float(entries.sum()) + 1e-6) - int((entries * hidden).sum())
                offered = is_whole[b % len(is_whole)][mine]
                prices = cost[b][mine, None].expand(offered.shape)[offered]
                chosen = _nearest_affordable(distance[b, h][mine][offered], prices, budget)
                opened[b, h, mine] |= torch.zeros_like(offered).masked_scatter(offered, chosen)
    return KeyChoice(
        rows, lambda: opened, lambda: _choice_figures(opened, seen, is_whole, cut, padding)
    )


# --- blocks of queries ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _QueryBlocks:
    """Some blocks of queries, and what the mask says of them.

    Attributes:
        first, last: Query rows ``[first, last)``.
        visible: bool ``[B or 1, rows, M]``.
        counted: Rows that speak for their block: real ones, or all where there is none, bool
            ``[B or 1, rows]``.
        seen: Rows of each block that see each key, int64 ``[B or 1, blocks, M]``.
        live: Rows of each block that see anything, int64 ``[B or 1, blocks]``.
        whole: Keys that all live rows of a block see, bool ``[B or 1, blocks, M]``.
    """

    first: int
    last: int
    visible: Tensor
    counted: Tensor
    seen: Tensor
    live: Tensor
    whole: Tensor


def _query_blocks(
    mask: AttentionMask, rows: int, batch_size: int, floats_per_row: int
) -> Iterator[_QueryBlocks]:
    """All blocks, some at a time."""
    step = max(1, _SCORES_AT_ONCE // (batch_size * floats_per_row * rows)) * rows
    valid, _ = mask.pooled_tokens(rows)
    for first in range(0, mask.n_queries, step):
        last = min(first + step, mask.n_queries)
        visible = mask.rows(first, last)
        counted = torch.ones(1, last - first, dtype=torch.bool, device=visible.device)
        if valid is not None:
            counted = valid[:, first:last]
        seen = tiled_rows(visible, rows, False).sum(2)
        live = tiled_rows(visible.any(-1, keepdim=True), rows, False).sum(2)
        yield _QueryBlocks(
            first, last, visible, counted, seen, live[..., 0], (seen == live) & (live > 0)
        )


def _distances(
    features: ByteFeatures,
    block: _QueryBlocks,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
) -> Tensor:
    """How far below a query's estimated log-sum-exp a key's score stays, for the query of the
    block to which it comes nearest, in steps; uint8 ``[B, H, blocks, M]``.
    """
    own = features.query[:, :, block.first : block.last]
    blocks = slice(block.first // config.rows, -(-block.last // config.rows))
    unit = features.unit[:, :, blocks, None]
    logits = own @ features.key.mT
    if rule.bias is not None:
        bias = rule.bias[:, :, block.first : block.last]
        logits = logits + (bias / each_row(unit, own, config.rows)).round()
    logits = logits.masked_fill(~block.visible[:, None], -torch.inf)
    weights = _log_weights(block, mask, config, logits)
    normaliser = (logits * each_row(unit, own, config.rows) + weights).logsumexp(-1, keepdim=True)
    # Rows that see nothing, whose log-sum-exp is -inf, say nothing.
    speaks = block.counted[:, None, :, None] & (normaliser > -torch.inf)
    below = logits - (normaliser / each_row(unit, own, config.rows)).round()
    below = below.masked_fill(~speaks, -torch.inf)
    nearest = tiled_rows(below, config.rows, -torch.inf).amax(3) * unit
    steps = (-STEPS_PER_NAT * nearest.clamp(min=-FARTHEST)).floor().clamp(0, FARTHEST - 1) + 1
    keys = torch.arange(mask.n_keys, device=logits.device)
    favoured = keys < _first_key(mask, logits.device) + config.first_keys
    return steps.masked_fill(favoured[:, None, None], 0).to(torch.uint8)


def _log_weights(
    block: _QueryBlocks, mask: AttentionMask, config: MraKeysConfig, logits: Tensor
) -> Tensor:
    """Logarithms of how often each key counts in log-sum-exps, ``[B or 1, 1, rows, M]``."""
    key = torch.arange(mask.n_keys, device=logits.device)
    row = torch.arange(block.first, block.last, device=logits.device)
    first = row // config.rows * config.rows + mask.n_keys - mask.n_queries
    end = first + config.rows
    low = torch.div(first - _CLOSE, _CHUNK, rounding_mode="floor")[:, None]
    high = torch.div(end + _CLOSE - 1, _CHUNK, rounding_mode="floor")[:, None]
    chunk = key // _CHUNK
    front = _first_key(mask, logits.device) // _CHUNK
    singly = (chunk >= low) & (chunk <= high) | (chunk == front)[:, None]
    none = logits.new_full((), -torch.inf)
    others = torch.where(key % APART == 0, logits.new_full((), math.log(APART)), none)
    return torch.where(singly, logits.new_zeros(()), others)[:, None]


def _first_key(mask: AttentionMask, device: torch.device) -> Tensor:
    """Left padding moves the first key, int64 ``[B or 1, 1]``."""
    if mask.key_valid is None:
        return torch.zeros(1, 1, dtype=torch.int64, device=device)
    return mask.key_valid.int().argmax(1, keepdim=True)


def _nearest_affordable(distance: Tensor, price: Tensor, budget: int) -> Tensor:
    """The nearest offers whose prices add up to at most the budget, bool ``[P]``; ties go to the
    lower index, and the first that is too dear ends the row."""
    spent = torch.zeros(FARTHEST + 1, dtype=torch.int64, device=price.device)
    spent = spent.index_add(0, distance.long(), price).cumsum(0)
    last = int((spent <= budget).sum())  # the step at which the money runs out
    if last > FARTHEST:
        return torch.ones_like(distance, dtype=torch.bool)
    rest = budget - (int(spent[last - 1]) if last else 0)
    at_edge = distance == last
    return (distance < last) | (at_edge & ((price * at_edge).cumsum(0) <= rest))


def _choice_figures(
    opened: Tensor, seen: Tensor, whole: Tensor, cut: Tensor, padding: Tensor
) -> tuple[Tensor, Tensor, int, int, int]:
    real = seen * ~padding[..., None]
    total = real.sum((-2, -1)).clamp(min=1)[:, None]
    exact = (opened * real[:, None]).sum((-2, -1))
    forced = (real * cut).sum((-2, -1))[:, None].expand_as(exact)
    left = int((whole[:, None] & ~opened).sum())
    heads = opened.shape[1]
    estimated = heads * int(seen.expand(len(opened), -1, -1).sum())
    return exact / total, forced / total, int((opened * seen[:, None]).sum()), left, estimated


# --- softmax in two parts ---------------------------------------------------------------------


def _opened_part(
    query: Tensor, key: Tensor, value: Tensor, block: _QueryBlocks, opened: Tensor, rule: ScoreRule
) -> SoftmaxPart:
    """Softmax over the visible entries of opened keys."""
    bias = None if rule.bias is None else rule.bias[:, :, block.first : block.last]
    logits = rule.logits(query @ key.mT, bias)
    visible = opened & block.visible[:, None]
    return _softmax_part(logits.masked_fill(~visible, -torch.inf), value)


def _tail_part(
    query: Tensor,
    mean: Tensor,
    key: Tensor,
    value: Tensor,
    left: Tensor,
    block: _QueryBlocks,
    config: MraKeysConfig,
    rule: ScoreRule,
) -> SoftmaxPart:
    """Softmax over keys left behind at the scores of each block's mean query, for all its rows."""
    bias = None
    if rule.bias is not None:
        own = rule.bias[:, :, block.first : block.last]
        bias = counted_means(own, block.counted, config.rows)
    logits = rule.logits(mean @ key.mT, bias).masked_fill(~left, -torch.inf)
    tilted = config.tail == "tilted" and rule.softcap is None
    part = _softmax_part(logits, torch.cat([value, key], -1) if tilted else value)
    peak, mass, weighted = (
        each_row(x, query, config.rows) for x in (part.peak, part.mass, part.weighted)
    )
    if not tilted:
        return SoftmaxPart(peak, mass, weighted)
    mean_key = weighted[..., value.shape[3] :] / mass.masked_fill(mass == 0, 1.0)[..., None]
    tilt = ((query - each_row(mean, query, config.rows)) * mean_key).sum(-1) * rule.scaling
    growth = torch.exp(tilt - tilt.detach())  # 1; carries the gradient
    weighted = weighted[..., : value.shape[3]] * growth[..., None]
    return SoftmaxPart(peak + tilt.detach(), mass * growth, weighted)


def _softmax_part(logits: Tensor, value: Tensor) -> SoftmaxPart:
    peak = logits.detach().amax(-1)
    weights = torch.exp(logits - peak.masked_fill(peak == -torch.inf, 0.0)[..., None])
    return SoftmaxPart(peak, weights.sum(-1), weights @ value)
