"""The operator on CPUs, in C++ (``_cpu/``): compiled at first use, float32, no gradients.

Blocks are opened by the rules of `selection.py`; scores are summed in another order than in torch,
so blocks whose scores agree to the last bits may change places.
"""

from __future__ import annotations

import functools
import time
from ctypes import byref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mra_kernels import _build
from mra_kernels._library import (
    ChoiceStruct,
    LevelStruct,
    ScratchStruct,
    bias_of,
    bits_of,
    block_means,
    call_of,
    floats,
    library,
    rows_of,
)
from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.native_keys import keys_native
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import BlockPairs, Selection, pair_logits

if TYPE_CHECKING:
    from mra_kernels.decode import KeyPyramid

__all__ = ["block_means", "build", "floats", "keys_native", "mra_native", "reason_against"]

_OFFERS = 1 << 19
"""Block pairs on offer at a time, 8 bytes each, where there are threads to spare."""

_COARSE = {"none": 0, "pooled": 1, "per_query": 2}


def build() -> float:
    """Compiles the library if need be.

    Returns:
        Seconds it took; 0.0 if it was in the cache.

    Raises:
        RuntimeError: It cannot be compiled; one line says why.
    """
    before = time.perf_counter()
    known = _build.is_cached()
    library()
    return 0.0 if known else time.perf_counter() - before


def reason_against(*tensors: Tensor | None, mask: AttentionMask | None = None) -> str | None:
    """Why the C++ path can't take these tensors, in one line; None if it can."""
    given = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling() or any(type(x) is not Tensor for x in given):
        return "native takes plain tensors, outside torch.compile"
    if any(x.device.type != "cpu" for x in given):
        return "native runs on the CPU only"
    if any(x.dtype == torch.float64 for x in given):
        return "native computes in float32, and float64 was given"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "native has no gradients; use torch.no_grad() for inference"
    if mask is not None and mask.dense is not None:
        return "native takes masks that are intervals and padding, not any matrix"
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    try:
        library()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def mra_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
    pyramid: KeyPyramid | None = None,
) -> tuple[Tensor, Tensor, Selection]:
    """MRA attention; arguments and results as in `mra_reference`, lse in float32.

    ``pyramid``: means of the blocks of these keys and values; None: work them out.
    """
    q, k, v = (floats(x) for x in (query, key, value))
    batch_size, heads, n_queries, _ = q.shape
    output = q.new_empty(batch_size, heads, n_queries, v.shape[3])
    lse = q.new_empty(batch_size, heads, n_queries)
    rule = ScoreRule(rule.scaling, rule.softcap, None if rule.bias is None else floats(rule.bias))
    keep: list[Any] = [q, k, v, output, lse, rule]  # what the pointers below point to
    call = call_of(q, k, v, output, lse, mask, rule, sinks, keep)

    shapes, sides = config.block_shapes, config.resolutions[:-1]
    valid_q, valid_k = mask.pooled_tokens(shapes[0][0])
    pooled_q = block_means(q, valid_q, tuple(query_rows for query_rows, _ in shapes))
    if pyramid is not None:
        pooled_k, pooled_v = pyramid.blocks(k.shape[2])
    else:
        pooled_k = block_means(k, valid_k, sides)
        pooled_v = pooled_k if config.coarse == "none" else block_means(v, valid_k, sides)
    opened, left, largest, levels = [], [], 0, (LevelStruct * len(shapes))()
    for step, (query_rows, side) in enumerate(shapes):
        rows, cols = pooled_q[query_rows].shape[2], pooled_k[side].shape[2]
        bits = q.new_zeros((2, batch_size * heads, rows, -(-cols // 64)), dtype=torch.int64)
        opened.append(bits[0])
        left.append(bits[1])
        tokens = pooled_q[query_rows], pooled_k[side], pooled_v[side]
        levels[step] = _level(
            (query_rows, side), tokens, bits, mask, rule, config, batch_size, keep
        )
        levels[step].area = config.area(step)
        if config.coarse == "pooled":
            parts = q.new_empty(batch_size * heads, rows, v.shape[3] + 2)
            levels[step].parts = parts.data_ptr()
            keep.append(parts)
        largest = max(largest, rows * cols)
    padding = mask.blocks(sides[0], batch_size, shapes[0][0]).padding
    choice = ChoiceStruct(
        config.score == "row",
        config.scope == "row",
        config.blocks_per_row or 0,
        config.first_blocks,
        config.diagonal_blocks,
        mask.query_offset,
        config.coarse == "none",
        padding.data_ptr(),
    )
    # A head per thread at least is worked on at a time.
    group = min(batch_size * heads, max(torch.get_num_threads(), _OFFERS // largest))
    offers = q.new_empty(group * largest, dtype=torch.int64)
    scratch = ScratchStruct(offers.data_ptr(), group)
    tally = q.new_zeros((batch_size * heads, 4), dtype=torch.int64)
    library().mra_select(
        byref(call), levels, len(shapes), byref(choice), byref(scratch), tally.data_ptr()
    )
    library().mra_attend(byref(call), levels, len(shapes), _COARSE[config.coarse])
    output = for_blind_rows(output, v, mask, sinks)

    def figures() -> tuple[Tensor, Tensor, int]:
        exact, forced, scored, kept = tally.unbind(1)
        real = ~padding.repeat_interleave(shapes[0][0], dim=1)[:, :n_queries]
        total = (mask.legal_per_row() * real).sum(1).clamp(min=1)[:, None]
        dots = int(scored.sum()) + int(exact.sum())
        if config.coarse == "per_query":
            dots += int(kept.sum())
        return exact.view(batch_size, heads) / total, forced.view(batch_size, heads) / total, dots

    def pairs(first: int | None) -> tuple[BlockPairs, tuple[BlockPairs, ...]]:
        def listed(step: int, bits: Tensor) -> BlockPairs:
            query_rows, side = shapes[step]
            queries, keys = pooled_q[query_rows], pooled_k[side]
            if first is not None:  # heads that share keys, together
                bits = bits.unflatten(0, (batch_size, heads))[:, :first].flatten(0, 1)
                queries = queries[:, :first]
                keys = keys[:, : max(1, first * keys.shape[1] // heads)]
            return _listed(bits, queries, keys, shapes[step], mask, rule)

        coarse = () if config.coarse == "none" else map(listed, range(len(shapes)), left)
        return listed(len(shapes) - 1, opened[-1]), tuple(coarse)

    return output.to(value.dtype), lse, Selection(figures, pairs)


def _listed(
    bits: Tensor,
    queries: Tensor,
    keys: Tensor,
    shape: tuple[int, int],
    mask: AttentionMask,
    rule: ScoreRule,
) -> BlockPairs:
    """The pairs whose bit is set."""
    query_rows, side = shape
    head, row, col = bits_of(bits).nonzero(as_tuple=True)
    legal = mask.tile_counts(head // queries.shape[1], row, col, side, query_rows)
    pairs = BlockPairs(query_rows, side, head, row, col, legal, queries.new_empty(0))
    return replace(pairs, logit=pair_logits(pairs, queries, keys, mask, rule))


def _level(
    shape: tuple[int, int],
    tokens: tuple[Tensor, Tensor, Tensor],
    bits: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    config: MraAttentionConfig,
    batch_size: int,
    keep: list[Any],
) -> LevelStruct:
    query_rows, side = shape
    facts = mask.blocks(side, batch_size, query_rows)
    pair_bias = rule.block_bias(mask, side, query_rows)
    query_bias = rule.block_bias(mask, side) if config.coarse == "per_query" else None
    keep += [tokens, bits, pair_bias, query_bias]
    described = (facts.n_queries, facts.n_keys, facts.entries, facts.log_keys)
    return LevelStruct(
        query_rows,
        side,
        tokens[0].shape[2],
        tokens[1].shape[2],
        bits.shape[-1],
        *map(rows_of, tokens),
        bias_of(pair_bias),
        bias_of(query_bias),
        *(x.data_ptr() for x in (*described, facts.first_row, facts.first_col)),
        bits[0].data_ptr(),
        bits[1].data_ptr(),
    )
