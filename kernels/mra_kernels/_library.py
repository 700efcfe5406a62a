"""What the C++ library is told, field by field as in ``_cpu/call.h``, and the library itself."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mra_kernels import _build
from mra_kernels.masks import AttentionMask
from mra_kernels.scores import ScoreRule


class RowsStruct(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class BiasStruct(Structure):
    _fields_ = [*RowsStruct._fields_, ("col", c_int64)]


class CallStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64) for name in ("width", "value_width", "threads")),
        *((name, RowsStruct) for name in ("query", "key", "value")),
        ("start", c_void_p),
        ("stop", c_void_p),
        ("interval_batch", c_int64),
        ("real_before", c_void_p),
        ("real_batch", c_int64),
        ("bias", BiasStruct),
        *((name, c_void_p) for name in ("sinks", "output", "lse")),
        ("scaling", c_double),
        ("softcap", c_double),
    ]


class LevelStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("side", "key_side", "rows", "cols", "words")),
        *((name, RowsStruct) for name in ("query", "key", "value")),
        ("pair_bias", BiasStruct),
        ("query_bias", BiasStruct),
        *((name, c_void_p) for name in ("n_queries", "n_keys", "entries", "log_keys")),
        *((name, c_void_p) for name in ("first_row", "first_col", "open", "left")),
        ("area", c_double),
        ("parts", c_void_p),
    ]


class ChoiceStruct(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("by_row_best", "per_row", "blocks_per_row")),
        *((name, c_int64) for name in ("first_blocks", "diagonal_blocks", "offset", "leave_none")),
        ("padding", c_void_p),
    ]


class ScratchStruct(Structure):
    _fields_ = [("offers", c_void_p), ("heads", c_int64)]


class EstimateStruct(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("to_query", "to_key", "mean", "most")),
        *((name, c_int64) for name in ("wide", "fours", "padded")),
        *((name, c_void_p) for name in ("hidden", "counted", "budgets", "distances")),
        *((name, c_int64) for name in ("first_keys", "heads_at_once")),
    ]


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    rule: ScoreRule,
    sinks: Tensor | None,
    keep: list[Any],
) -> CallStruct:
    batch_size, heads, n_queries, width = query.shape
    start, stop = mask.start.contiguous(), mask.stop.contiguous()
    real = mask.real_before
    sinks = None if sinks is None else sinks.float().contiguous()
    keep += [start, stop, real, sinks]
    return CallStruct(
        batch_size,
        heads,
        key.shape[1],
        n_queries,
        key.shape[2],
        width,
        value.shape[3],
        torch.get_num_threads(),
        *map(rows_of, (query, key, value)),
        start.data_ptr(),
        stop.data_ptr(),
        n_queries if start.shape[0] > 1 else 0,
        None if real is None else real.data_ptr(),
        0 if real is None or real.shape[0] == 1 else real.shape[1],
        bias_of(rule.bias),
        None if sinks is None else sinks.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
        rule.scaling,
        rule.softcap or 0.0,
    )


def floats(tensor: Tensor) -> Tensor:
    """In float32 with adjacent features; a view where it is so already."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def bits_of(bitmap: Tensor) -> Tensor:
    """Each bit of an int64 bitmap, lowest first, bool ``[..., 64 * words]``."""
    each = torch.arange(8, dtype=torch.uint8)
    return (bitmap.contiguous().view(torch.uint8)[..., None] >> each & 1).bool().flatten(-2)


def rows_of(tensor: Tensor) -> RowsStruct:
    return RowsStruct(tensor.data_ptr(), *tensor.stride()[:3])


def bias_of(bias: Tensor | None) -> BiasStruct:
    if bias is None:
        return BiasStruct()
    strides = (
        0 if size == 1 and dim < 2 else stride
        for dim, (size, stride) in enumerate(zip(bias.shape, bias.stride(), strict=True))
    )
    return BiasStruct(bias.data_ptr(), *strides)


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
    library().mra_pool(
        byref(rows_of(tokens)),
        *(batch_size, heads, n, width),
        None if valid is None else valid.data_ptr(),
        0 if valid is None or valid.shape[0] == 1 else n,
        len(sides),
        (c_int64 * len(sides))(*sides),
        (RowsStruct * len(sides))(*(rows_of(into[side]) for side in sides)),
        torch.get_num_threads(),
    )
    return into


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled if need be.

    Raises:
        RuntimeError, OSError: It can't be compiled or loaded.
    """
    loaded = ctypes.CDLL(str(_build.compiled()))
    one, many = c_int64, c_void_p
    call, level, rows = POINTER(CallStruct), POINTER(LevelStruct), POINTER(RowsStruct)
    choice, scratch = POINTER(ChoiceStruct), POINTER(ScratchStruct)
    loaded.mra_select.argtypes = [call, level, one, choice, scratch, many]
    loaded.mra_select_keys.argtypes = [call, level, POINTER(EstimateStruct), many, many]
    loaded.mra_attend.argtypes = [call, level, one, one]
    loaded.mra_pool.argtypes = [
        *(rows, one, one, one, one, many, one, one, POINTER(one), rows, one)
    ]
    for function in (
        *(loaded.mra_select, loaded.mra_select_keys, loaded.mra_attend, loaded.mra_pool),
    ):
        function.restype = None
    return loaded
