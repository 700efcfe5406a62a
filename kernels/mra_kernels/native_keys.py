"""`keys_reference` on CPUs, in C++: the same keys, unless estimates agree to the last bits."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from mra_kernels._library import (
    EstimateStruct,
    LevelStruct,
    bias_of,
    bits_of,
    block_means,
    call_of,
    floats,
    library,
    rows_of,
)
from mra_kernels.config import MraKeysConfig
from mra_kernels.features import Directions
from mra_kernels.keys import KeyChoice
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule, block_mean

_GROUP = 64
"""Estimated keys are padded to an odd multiple of this: as many are scored at a time, and rows that
lie a power of two apart push each other out of a cache."""

_WIDEST = 16
"""Features are padded to a multiple of the most lanes of any processor."""

_DISTANCES = 1 << 22
"""Keys of blocks whose distances are kept at a time, a byte each, where there are threads to
spare."""

_POOLED, _TILTED = 1, 3


def keys_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, KeyChoice]:
    """Attention with opened keys exact; arguments and results as in `keys_reference`, lse in
    float32."""
    q, k, v = (floats(x) for x in (query, key, value))
    batch_size, heads, n_queries, _ = q.shape
    n_keys, rows = k.shape[2], config.rows
    output = q.new_empty(batch_size, heads, n_queries, v.shape[3])
    lse = q.new_empty(batch_size, heads, n_queries)
    rule = ScoreRule(rule.scaling, rule.softcap, None if rule.bias is None else floats(rule.bias))
    keep: list[Any] = [q, k, v, output, lse, rule]  # what the pointers below point to
    call = call_of(q, k, v, output, lse, mask, rule, sinks, keep)

    facts = mask.blocks(rows, batch_size)
    counted, _ = mask.pooled_tokens(rows)
    means = block_means(q, counted, (rows,))[rows]
    n_blocks, words = means.shape[2], -(-n_keys // 64)
    bits = q.new_zeros((2, batch_size * heads, n_blocks, words), dtype=torch.int64)
    tilted = config.tail == "tilted" and rule.softcap is None
    parts = q.new_empty(batch_size * heads, n_blocks, v.shape[3] + 2 + tilted * q.shape[3])
    bias = None
    if rule.bias is not None:
        bias = block_mean(rule.bias.mT, counted, rows).mT
    first_key = torch.zeros(batch_size, dtype=torch.int64)
    if mask.key_valid is not None:
        first_key = mask.key_valid.int().argmax(1).expand(batch_size).contiguous()
    level = LevelStruct(rows, 1, n_blocks, n_keys, words, *map(rows_of, (means, k, v)))
    level.pair_bias = bias_of(bias)
    level.entries, level.first_col = facts.entries.data_ptr(), first_key.data_ptr()
    level.open, level.left = bits[0].data_ptr(), bits[1].data_ptr()
    level.parts = parts.data_ptr()
    tally = _choose(q, k, mask, config, rule, call, level, facts.padding)
    library().mra_attend(byref(call), byref(level), 1, _TILTED if tilted else _POOLED)
    keep += [means, bits, parts, bias, first_key]
    output = for_blind_rows(output, v, mask, sinks)

    def opened() -> Tensor:
        return bits_of(bits[0])[..., :n_keys].unflatten(0, (batch_size, heads))

    def figures() -> tuple[Tensor, Tensor, int, int, int]:
        exact, forced, of_all, left = tally.unbind(1)
        real = ~facts.padding.repeat_interleave(rows, dim=1)[:, :n_queries]
        legal = mask.legal_per_row().expand(batch_size, -1)
        total = (legal * real).sum(1).clamp(min=1)[:, None]
        density, demanded = (x.view(batch_size, heads) / total for x in (exact, forced))
        return density, demanded, int(of_all.sum()), int(left.sum()), heads * int(legal.sum())

    return output.to(value.dtype), lse, KeyChoice(rows, opened, figures)


def _choose(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
    call: Any,
    level: LevelStruct,
    padding: Tensor,
) -> Tensor:
    """Fills the bitmaps of the level; returns the tallies of the heads."""
    batch_size, heads, n_queries, _ = query.shape
    n_keys = key.shape[2]
    directions = Directions.leading(query, key, mask, config.rank)
    to_query, to_key = (
        torch.nn.functional.pad(x, (0, -x.shape[3] % _WIDEST)).contiguous()
        for x in (directions.to_query * rule.scaling, directions.to_key)
    )
    mean = (directions.mean.repeat_interleave(heads // key.shape[1], 1) @ to_key).contiguous()
    most = directions.most.contiguous()
    padded = (-(-n_keys // _GROUP) | 1) * _GROUP
    hidden = None
    if mask.key_valid is not None:
        hidden = torch.nn.functional.pad(~mask.key_valid, (0, padded - n_keys), value=True)
        hidden = hidden.expand(batch_size, -1).contiguous()
    valid, _ = mask.pooled_tokens(config.rows)
    counted = torch.ones(1, n_queries, dtype=torch.bool) if valid is None else valid
    counted = counted.expand(batch_size, -1).contiguous()
    budgets = torch.tensor(config.budget_of_heads(heads), dtype=torch.float64)
    # A head per thread at least is worked on at a time.
    group = max(torch.get_num_threads(), _DISTANCES // (level.rows * padded))
    group = min(batch_size * heads, group)
    distances = torch.empty(group * level.rows * padded, dtype=torch.uint8)
    estimate = EstimateStruct(
        *(x.data_ptr() for x in (to_query, to_key, mean, most)),
        *(to_key.shape[3], -(-directions.to_key.shape[3] // 4), padded),
        None if hidden is None else hidden.data_ptr(),
        *(x.data_ptr() for x in (counted, budgets, distances)),
        config.first_keys,
        group,
    )
    tally = torch.zeros((batch_size * heads, 4), dtype=torch.int64)
    library().mra_select_keys(
        byref(call), byref(level), byref(estimate), padding.data_ptr(), tally.data_ptr()
    )
    return tally
