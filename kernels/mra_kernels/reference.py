"""MRA attention in plain torch: the specification every other implementation is held to.

Any float dtype (half types are computed in float32, float64 stays float64), any device, autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask, captured
from mra_kernels.pyramid import block_pyramid, pad_blocks, take_blocks
from mra_kernels.scores import ScoreRule, gather_bias
from mra_kernels.selection import BlockPairs, Selection, select_blocks

_TILE_ROWS = 16
"""Query rows that share one matrix product, where blocks are smaller than that."""

_CHUNK_FLOATS = 1 << 20
"""Gathered numbers in flight at once: bounds each temporary to a few MB, about a cache."""


@dataclass(frozen=True, eq=False)
class SoftmaxPart:
    """An unnormalised softmax over part of the keys: ``output = weighted / mass``.

    Attributes:
        peak: Stabiliser, ``[R, side]``; -inf where the part is empty.
        mass: Sum of ``exp(logit - peak)``, ``[R, side]``.
        weighted: The same sum weighted by the values, ``[R, side, Dv]``.
    """

    peak: Tensor
    mass: Tensor
    weighted: Tensor

    def merge(self, other: SoftmaxPart) -> SoftmaxPart:
        """Both parts as one."""
        peak = torch.maximum(self.peak, other.peak)
        base = peak.masked_fill(peak == -torch.inf, 0.0)
        mine, theirs = torch.exp(self.peak - base), torch.exp(other.peak - base)
        return SoftmaxPart(
            peak,
            self.mass * mine + other.mass * theirs,
            self.weighted * mine[..., None] + other.weighted * theirs[..., None],
        )

    def flat(self) -> SoftmaxPart:
        """With one row per query: ``[R * side]``."""
        return SoftmaxPart(
            self.peak.flatten(0, 1), self.mass.flatten(0, 1), self.weighted.flatten(0, 1)
        )


@dataclass(frozen=True, eq=False)
class _Operands:
    """Inputs cut into blocks, flattened over batch and heads.

    Attributes:
        query: Tiles of ``group`` query blocks, ``[B * H, tiles, group * query_rows, D]``.
        key, value: Blocks of ``side`` keys, ``[B * Hkv, cols, side, D]`` and ``[..., Dv]``.
        group: Query blocks per tile: small blocks share one matrix product.
        heads, per_kv: Query heads, and how many of them share a key head.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    group: int
    heads: int
    per_kv: int


def mra_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
    selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Selection]:
    """MRA attention.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, Hkv, M, D]``, Hkv dividing H.
        value: ``[B, Hkv, M, Dv]``.
        mask: Who may see whom; N x M.
        config: The operator.
        rule: Scaling, soft-cap and bias.
        sinks: Logits that only feed the denominator, ``[H]``, or None.
        selection: The blocks to open; None: choose them.

    Returns:
        Output ``[B, H, N, Dv]``, the log-sum-exp of the exactly computed logits ``[B, H, N]``
        (-inf where a row has none), and the selection.
    """
    batch_size, heads, n_queries, _ = query.shape
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    query_rows, coarsest = config.block_shapes[0]
    q = pad_blocks(query.to(dtype), query_rows)
    k, v = (pad_blocks(x.to(dtype), coarsest) for x in (key, value))
    query_valid, key_valid = (
        _padded(valid, length, x)
        for valid, length, x in zip(
            mask.pooled_tokens(query_rows), (n_queries, key.shape[2]), (q, k), strict=True
        )
    )
    pooled_q = block_pyramid(q, query_valid, tuple(rows for rows, _ in config.block_shapes))
    pooled_k = block_pyramid(k, key_valid, config.resolutions)
    if selection is None:
        selection = select_blocks(pooled_q, pooled_k, mask, config, rule)
    else:
        selection = selection.rescored(pooled_q, pooled_k, mask, rule)

    def cut(pairs: BlockPairs) -> _Operands:
        group = math.gcd(query_rows // pairs.query_rows, max(1, _TILE_ROWS // pairs.query_rows))
        tiles = q.unflatten(2, (-1, group * pairs.query_rows)).flatten(0, 1)
        keys, values = (x.unflatten(2, (-1, pairs.side)).flatten(0, 1) for x in (k, v))
        return _Operands(tiles, keys, values, group, heads, heads // key.shape[1])

    fine = _exact_part(cut(selection.fine), selection.fine, mask, rule).flat()
    total = fine
    if selection.coarse:
        pooled_v = block_pyramid(v, key_valid, config.resolutions)
    for pairs in selection.coarse:
        _, counts = mask.block_sizes(pairs.side, batch_size)
        means = pooled_k[pairs.side].flatten(0, 1), pooled_v[pairs.side].flatten(0, 1)
        per_query = config.coarse == "per_query"
        part = _coarse_part(cut(pairs), pairs, *means, counts, mask, rule, per_query)
        total = total.merge(part.flat())
    total = _with_sinks(total, sinks, heads, batch_size)

    def rows(flat: Tensor) -> Tensor:
        return flat.unflatten(0, (batch_size, heads, -1))[:, :, :n_queries]

    output = rows(total.weighted / total.mass.masked_fill(total.mass == 0, 1.0)[..., None])
    output = for_blind_rows(output, v, mask, sinks)
    lse = fine.peak + fine.mass.log()
    return output.to(value.dtype), rows(lse), selection


def _exact_part(
    ops: _Operands, pairs: BlockPairs, mask: AttentionMask, rule: ScoreRule
) -> SoftmaxPart:
    """Softmax over the entries of ``pairs``."""
    rows, side, group = pairs.query_rows, pairs.side, ops.group
    inner = torch.arange(side, device=pairs.head.device)
    done = _Rows(ops)
    cut = _append(pairs.legal < rows * side, False)
    for row, col, member, chosen in _tile_lists(ops, pairs, side * max(rows, ops.key.shape[-1])):
        head, tile = row // ops.query.shape[1], row % ops.query.shape[1]
        batch, kv = head // ops.heads, (head // ops.per_kv)[:, None]
        dots = take_blocks(ops.query, head, tile) @ take_blocks(ops.key, kv, col).flatten(
            1, 2
        ).transpose(1, 2)
        bias = None
        if rule.bias is not None:
            at_key = (col[:, :, None] * side + inner).clamp(max=mask.n_keys - 1).flatten(1)
            where = _query_places(ops, tile, mask)[:, :, None], at_key[:, None]
            bias = gather_bias(
                rule.bias, batch[:, None, None], (head % ops.heads)[:, None, None], *where
            )
        visible = chosen.transpose(1, 2)[:, :, None, :, None].expand(-1, -1, rows, -1, side)
        at, place, sub = (cut[member] & chosen).nonzero(as_tuple=True)
        if len(at):
            visible = visible.clone()
            visible[at, sub, :, place] = mask.tiles(
                batch[at], tile[at] * group + sub, col[at, place], side, rows
            )
        logits = rule.logits(dots, bias).masked_fill(~visible.reshape(dots.shape), -torch.inf)
        done.add(row, logits, take_blocks(ops.value, kv, col).flatten(1, 2))
    return done.part()


def _coarse_part(
    ops: _Operands,
    pairs: BlockPairs,
    mean_key: Tensor,
    mean_value: Tensor,
    counts: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    per_query: bool,
) -> SoftmaxPart:
    """Softmax over ``pairs`` at one pooled score per block, or per query row and block."""
    bias = rule.block_bias(mask, pairs.side) if per_query else None
    pooled = _append(pairs.logit, -torch.inf)
    done = _Rows(ops)
    widest = max(pairs.query_rows, ops.key.shape[-1])
    for row, col, member, chosen in _tile_lists(ops, pairs, widest):
        head, tile = row // ops.query.shape[1], row % ops.query.shape[1]
        batch, kv = head // ops.heads, (head // ops.per_kv)[:, None]
        if per_query:
            dots = take_blocks(ops.query, head, tile) @ take_blocks(mean_key, kv, col).transpose(
                1, 2
            )
            own = gather_bias(
                bias,
                batch[:, None, None],
                (head % ops.heads)[:, None, None],
                _query_places(ops, tile, mask)[:, :, None],
                col[:, None],
            )
            visible = chosen.transpose(1, 2).repeat_interleave(pairs.query_rows, dim=1)
            logits = rule.logits(dots, own).masked_fill(~visible, -torch.inf)
        else:
            logits = pooled[member].transpose(1, 2)
        # A block stands for as many keys as it holds real ones.
        size = counts[batch[:, None], col].to(logits.dtype).log()
        done.add(row, logits + size[:, None], take_blocks(mean_value, kv, col))
    return done.part()


def _query_places(ops: _Operands, tile: Tensor, mask: AttentionMask) -> Tensor:
    """Positions of the queries of each tile, ``[R, rows]``; beyond the last one, the last."""
    rows = ops.query.shape[2]
    inner = torch.arange(rows, device=tile.device)
    return (tile[:, None] * rows + inner).clamp(max=mask.n_queries - 1)


def _append(values: Tensor, last: float) -> Tensor:
    """``values`` with one more, for the index -1."""
    return torch.cat([values, values.new_full((1,), last)])


class _Rows:
    """Collects the softmax of tiles, computed some at a time, into one part."""

    def __init__(self, ops: _Operands) -> None:
        shape = (ops.query.shape[0] * ops.query.shape[1], ops.query.shape[2])
        self._peak = ops.query.new_full(shape, -torch.inf)
        self._mass = ops.query.new_zeros(shape)
        self._weighted = ops.query.new_zeros(*shape, ops.value.shape[-1])

    def add(self, row: Tensor, logits: Tensor, values: Tensor) -> None:
        """Logits ``[R, rows or a divisor, keys]`` and values ``[R, keys, Dv]`` of tiles ``[R]``."""
        peak = logits.detach().amax(-1)
        base = peak.masked_fill(peak == -torch.inf, 0.0)
        weights = torch.exp(logits - base[..., None])
        repeat = self._peak.shape[1] // logits.shape[1]
        parts = peak, weights.sum(-1), weights @ values
        peak, mass, weighted = (part.repeat_interleave(repeat, dim=1) for part in parts)
        self._peak.index_copy_(0, row, peak)
        self._mass.index_copy_(0, row, mass)
        self._weighted.index_copy_(0, row, weighted)

    def part(self) -> SoftmaxPart:
        return SoftmaxPart(self._peak, self._mass, self._weighted)


def _tile_lists(
    ops: _Operands, pairs: BlockPairs, floats_per_block: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The key blocks that each tile needs, as padded lists, some tiles of similar length at a time.

    Yields:
        Tiles (flat index) ``[R]``; their key blocks ``[R, C]``; for each of the tile's query blocks
        the position in ``pairs`` of its pair with that key block, -1 for none, ``[R, C, group]``;
        and which of them there are, bool of the same shape.
    """
    if not len(pairs):
        return
    group, tile_rows = ops.group, ops.query.shape[1]
    row = pairs.head * tile_rows + pairs.row // group
    wanted, entry = row * ops.key.shape[1] + pairs.col, torch.arange(len(pairs), device=row.device)
    member = entry[:, None]
    if group > 1:
        wanted, place = wanted.unique(return_inverse=True)
        member = torch.full((len(wanted), group), -1, device=row.device)
        member[place, pairs.row % group] = entry
    row, col = wanted // ops.key.shape[1], wanted % ops.key.shape[1]
    row, length = row.unique_consecutive(return_counts=True)
    begin = length.cumsum(0) - length
    order = length.argsort(descending=True, stable=True)
    row, length, begin = row[order], length[order], begin[order]
    first = 0
    while first < row.numel():
        longest = int(length[first])
        last = first + max(1, _CHUNK_FLOATS // (longest * floats_per_block))
        place = torch.arange(longest, device=row.device)
        real = place < length[first:last, None]
        pick = (begin[first:last, None] + place) * real
        members = member[pick].masked_fill(~real[..., None], -1)
        yield row[first:last], col[pick], members, members >= 0
        first = last


def _padded(valid: Tensor | None, length: int, tokens: Tensor) -> Tensor | None:
    """Which of the tokens count: ``valid`` of the first ``length``, none of the padding."""
    if valid is None:
        if length == tokens.shape[2]:
            return None
        valid = torch.ones(1, length, dtype=torch.bool, device=tokens.device)
    return torch.nn.functional.pad(valid, (0, tokens.shape[2] - length))


def _with_sinks(
    part: SoftmaxPart, sinks: Tensor | None, heads: int, batch_size: int
) -> SoftmaxPart:
    if sinks is None:
        return part
    per_row = sinks.to(part.mass.dtype).view(1, heads, 1).expand(batch_size, heads, 1)
    logits = per_row.expand(-1, -1, part.mass.numel() // (batch_size * heads)).flatten()
    return part.merge(
        SoftmaxPart(logits.detach(), torch.exp(logits - logits.detach()), part.weighted * 0)
    )


def for_blind_rows(
    output: Tensor, value: Tensor, mask: AttentionMask, sinks: Tensor | None
) -> Tensor:
    """Rows that may see nothing get the mean of the real values (nothing from sinks), never NaN.

    Args:
        output: ``[B, H, N, Dv]``.
        value: ``[B, Hkv, M or more, Dv]``.
    """
    if torch.compiler.is_compiling() or output.is_meta or captured(output):  # no number to look at
        blind: Tensor | None = mask.legal_per_row() == 0
    else:
        blind = mask.blind_rows
    if blind is None:
        return output
    if sinks is not None:
        return output.masked_fill(blind[:, None, :, None], 0.0)
    value = value[:, :, : mask.n_keys]
    valid = mask.key_valid
    weights = value.new_ones(1, mask.n_keys) if valid is None else valid.to(value.dtype)
    sums = torch.einsum("bhmd,bm->bhd", value, weights.expand(value.shape[0], -1))
    mean = sums / weights.sum(-1).clamp(min=1)[:, None, None]
    mean = mean.repeat_interleave(output.shape[1] // value.shape[1], dim=1)
    return torch.where(blind[:, None, :, None], mean[:, :, None], output)
