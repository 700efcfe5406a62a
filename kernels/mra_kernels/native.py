"""The operator on CPUs, in C++ (``_cpu/``): compiled at first use, float32, no gradients.

Blocks are opened by the rules of `selection.py`; scores are summed in another order than in torch,
so blocks whose scores agree to the last bits may change places.
"""

from __future__ import annotations

import ctypes
import functools
import time
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mra_kernels import _build
from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import BlockPairs, Selection, pair_logits

if TYPE_CHECKING:
    from mra_kernels.decode import KeyPyramid

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
    _library()
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
        _library()
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
    call = _call(q, k, v, output, lse, mask, rule, sinks, keep)

    sides = config.resolutions[:-1]
    valid_q, valid_k = mask.pooled_tokens(sides[0])
    pooled_q = block_means(q, valid_q, sides)
    if pyramid is not None:
        pooled_k, pooled_v = pyramid.blocks(k.shape[2])
    else:
        pooled_k = block_means(k, valid_k, sides)
        pooled_v = pooled_k if config.coarse == "none" else block_means(v, valid_k, sides)
    opened, left, largest, levels = [], [], 0, (_Level * len(sides))()
    for step, side in enumerate(sides):
        rows, cols = pooled_q[side].shape[2], pooled_k[side].shape[2]
        bits = q.new_zeros((2, batch_size * heads, rows, -(-cols // 64)), dtype=torch.int64)
        opened.append(bits[0])
        left.append(bits[1])
        tokens = pooled_q[side], pooled_k[side], pooled_v[side]
        levels[step] = _level(side, tokens, bits, mask, rule, config, batch_size, keep)
        levels[step].area = config.area(step)
        if config.coarse == "pooled":
            parts = q.new_empty(batch_size * heads, rows, v.shape[3] + 2)
            levels[step].parts = parts.data_ptr()
            keep.append(parts)
        largest = max(largest, rows * cols)
    padding = mask.blocks(sides[0], batch_size).padding
    choice = _Choice(
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
    scratch = _Scratch(offers.data_ptr(), group)
    tally = q.new_zeros((batch_size * heads, 4), dtype=torch.int64)
    library = _library()
    library.mra_select(
        byref(call), levels, len(sides), byref(choice), byref(scratch), tally.data_ptr()
    )
    library.mra_attend(byref(call), levels, len(sides), _COARSE[config.coarse])
    output = for_blind_rows(output, v, mask, sinks)

    def figures() -> tuple[Tensor, Tensor, int]:
        exact, forced, scored, kept = tally.unbind(1)
        real = ~padding.repeat_interleave(sides[0], dim=1)[:, :n_queries]
        total = (mask.legal_per_row() * real).sum(1).clamp(min=1)[:, None]
        dots = int(scored.sum()) + int(exact.sum())
        if config.coarse == "per_query":
            dots += int(kept.sum())
        return exact.view(batch_size, heads) / total, forced.view(batch_size, heads) / total, dots

    def pairs(first: int | None) -> tuple[BlockPairs, tuple[BlockPairs, ...]]:
        def listed(step: int, bits: Tensor) -> BlockPairs:
            side = sides[step]
            queries, keys = pooled_q[side], pooled_k[side]
            if first is not None:  # heads that share keys, together
                bits = bits.unflatten(0, (batch_size, heads))[:, :first].flatten(0, 1)
                queries = queries[:, :first]
                keys = keys[:, : max(1, first * keys.shape[1] // heads)]
            return _listed(bits, queries, keys, side, mask, rule)

        coarse = () if config.coarse == "none" else map(listed, range(len(sides)), left)
        return listed(len(sides) - 1, opened[-1]), tuple(coarse)

    return output.to(value.dtype), lse, Selection(figures, pairs)


def _listed(
    bits: Tensor, queries: Tensor, keys: Tensor, side: int, mask: AttentionMask, rule: ScoreRule
) -> BlockPairs:
    """The pairs whose bit is set."""
    each = torch.arange(8, dtype=torch.uint8)
    chosen = (bits.contiguous().view(torch.uint8)[..., None] >> each & 1).bool().flatten(2)
    head, row, col = chosen.nonzero(as_tuple=True)
    legal = mask.tile_counts(head // queries.shape[1], row, col, side)
    pairs = BlockPairs(side, head, row, col, legal, queries.new_empty(0))
    return BlockPairs(side, head, row, col, legal, pair_logits(pairs, queries, keys, mask, rule))


def block_means(
    tokens: Tensor,
    valid: Tensor | None,
    sides: tuple[int, ...],
    into: dict[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """`block_pyramid` of float32 tokens of any length, in one pass.

    Args:
        tokens: ``[B, H, n, d]``, adjacent features.
        valid: False for padding, bool ``[B or 1, n]``; None: all real.
        sides: Block sides from coarse to fine.
        into: Where to write, ``[B, H, n / side or more, d]`` per side; None: new tensors.
    """
    batch_size, heads, n, width = tokens.shape
    if into is None:
        into = {s: tokens.new_empty(batch_size, heads, -(-n // s), width) for s in sides}
    if valid is not None:
        valid = valid.contiguous()
    _library().mra_pool(
        byref(_rows(tokens)),
        *(batch_size, heads, n, width),
        None if valid is None else valid.data_ptr(),
        0 if valid is None or valid.shape[0] == 1 else n,
        len(sides),
        (c_int64 * len(sides))(*sides),
        (_Rows * len(sides))(*(_rows(into[side]) for side in sides)),
        torch.get_num_threads(),
    )
    return into


# --- what C++ sees; field by field as in _cpu/call.h -----------------------------------------


class _Rows(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class _Bias(Structure):
    _fields_ = [*_Rows._fields_, ("col", c_int64)]


class _Call(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width", "threads")),
        *((name, _Rows) for name in ("query", "key", "value")),
        ("start", c_void_p),
        ("stop", c_void_p),
        ("interval_batch", c_int64),
        ("real_before", c_void_p),
        ("real_batch", c_int64),
        ("bias", _Bias),
        *((name, c_void_p) for name in ("sinks", "output", "lse")),
        ("scaling", c_double),
        ("softcap", c_double),
    ]


class _Level(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("side", "rows", "cols", "words")),
        *((name, _Rows) for name in ("query", "key", "value")),
        ("pair_bias", _Bias),
        ("query_bias", _Bias),
        *((name, c_void_p) for name in ("n_queries", "n_keys", "entries", "log_keys")),
        *((name, c_void_p) for name in ("first_row", "first_col", "open", "left")),
        ("area", c_double),
        ("parts", c_void_p),
    ]


class _Choice(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("by_row_best", "per_row", "blocks_per_row")),
        *((name, c_int64) for name in ("first_blocks", "diagonal_blocks", "offset", "leave_none")),
        ("padding", c_void_p),
    ]


class _Scratch(Structure):
    _fields_ = [("offers", c_void_p), ("heads", c_int64)]


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    sinks: Tensor | None,
    keep: list[Any],
) -> _Call:
    batch_size, heads, n_queries, width = query.shape
    start, stop = mask.start.contiguous(), mask.stop.contiguous()
    real = mask.real_before
    sinks = None if sinks is None else sinks.float().contiguous()
    keep += [start, stop, real, sinks]
    return _Call(
        batch_size,
        heads,
        key.shape[1],
        n_queries,
        key.shape[2],
        width,
        value.shape[3],
        torch.get_num_threads(),
        *map(_rows, (query, key, value)),
        start.data_ptr(),
        stop.data_ptr(),
        n_queries if start.shape[0] > 1 else 0,
        None if real is None else real.data_ptr(),
        0 if real is None or real.shape[0] == 1 else real.shape[1],
        _bias(rule.bias),
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
        rule.scaling,
        rule.softcap or 0.0,
    )


def _level(
    side: int,
    tokens: tuple[Tensor, Tensor, Tensor],
    bits: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    config: MraAttentionConfig,
    batch_size: int,
    keep: list[Any],
) -> _Level:
    facts = mask.blocks(side, batch_size)
    pair_bias = rule.block_bias(mask, side, per_query=False)
    per_query = config.coarse == "per_query"
    query_bias = rule.block_bias(mask, side, per_query=True) if per_query else None
    keep += [tokens, bits, pair_bias, query_bias]
    described = (facts.n_queries, facts.n_keys, facts.entries, facts.log_keys)
    return _Level(
        side,
        tokens[0].shape[2],
        tokens[1].shape[2],
        bits.shape[-1],
        *map(_rows, tokens),
        _bias(pair_bias),
        _bias(query_bias),
        *(x.data_ptr() for x in (*described, facts.first_row, facts.first_col)),
        bits[0].data_ptr(),
        bits[1].data_ptr(),
    )


def floats(tensor: Tensor) -> Tensor:
    """In float32 with adjacent features; a view where it is so already."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> _Rows:
    return _Rows(tensor.data_ptr(), *tensor.stride()[:3])


def _bias(bias: Tensor | None) -> _Bias:
    if bias is None:
        return _Bias()
    strides = (
        0 if size == 1 and dim < 2 else stride
        for dim, (size, stride) in enumerate(zip(bias.shape, bias.stride(), strict=True))
    )
    return _Bias(bias.data_ptr(), *strides)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build.compiled()))
    one, many = c_int64, c_void_p
    library.mra_select.argtypes = [
        *(POINTER(_Call), POINTER(_Level), one, POINTER(_Choice), POINTER(_Scratch), many)
    ]
    library.mra_attend.argtypes = [POINTER(_Call), POINTER(_Level), one, one]
    library.mra_pool.argtypes = [
        *(POINTER(_Rows), one, one, one, one, many, one, one, POINTER(one), POINTER(_Rows), one),
    ]
    for function in (library.mra_select, library.mra_attend, library.mra_pool):
        function.restype = None
    return library
