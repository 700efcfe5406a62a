"""Triton's interpreter, made right for bfloat16 and quicker. For ``TRITON_INTERPRET=1`` only.

As it comes (3.9) it keeps bfloat16 as its bits: products, sums and comparisons work on those, and
casts cut instead of rounding; a constant times a tensor is no tensor. And it patches all of
`triton.language` at every call of a device function; here once a launch.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def install() -> None:
    """Once is enough; again does nothing."""
    if interpreter._patch_lang is not _patch_once:
        _repair_bfloat16()
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
            setattr(tl.constexpr, f"__{name}__", _with_tensors(name))
        interpreter._patch_lang = _patch_once


def widened(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> np.ndarray:
    """Float32 as bits of the nearest bfloat16, ties to even."""
    numbers = np.asarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), near)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    return _Handle(widened(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(numbers: np.ndarray) -> Any:
    return _Handle(rounded(numbers), tl.bfloat16)


def _repair_bfloat16() -> None:
    dot, cast, binary = _Builder.create_dot, _Builder.cast_impl, _Builder.binary_op
    unary, ternary, convert = _Builder.unary_op, _Builder.ternary_op, _Builder.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        return dot(self, _wide(a), _wide(b), c, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            wide = _wide(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return _narrow(source.data.astype(np.float32))
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, mode)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)):
            return binary(self, left, right, op)
        out = op(_wide(left).data, _wide(right).data)
        return _Handle(out, tl.bfloat16) if out.dtype == np.bool_ else _narrow(out)

    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _narrow(op(_wide(operand).data)) if _is_bf16(operand) else unary(self, operand, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if _is_bf16(c) and op is not np.where:
            return _narrow(op(*(_wide(x).data for x in (a, b, c))))
        return ternary(self, a, b, c, op)

    _Builder.create_dot, _Builder.cast_impl, _Builder.binary_op = create_dot, cast_impl, binary_op
    _Builder.unary_op, _Builder.ternary_op = unary_op, ternary_op
    _Builder.create_fp_to_fp = create_fp_to_fp


def _with_tensors(name: str) -> Any:
    """A constant and a tensor make a tensor, as they do for the compiler."""
    before, plain = getattr(tl.constexpr, f"__{name}__"), getattr(operator, name)

    def combined(self: Any, other: Any) -> Any:
        return plain(self.value, other) if isinstance(other, tl.tensor) else before(self, other)

    return combined


_patch_all, _patched = interpreter._patch_lang, []


class _Nothing:
    def restore(self) -> None:
        """Device functions leave the patches alone."""


def _patch_once(function: Any) -> Any:
    if _patched:
        return _Nothing()
    # Functions of Triton's own library see tl.core, kernels see tl.
    scope = _patch_all(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    _patched.append(scope)
    undo = scope.restore

    def restore() -> None:
        undo()
        _patched.clear()

    scope.restore = restore
    return scope
