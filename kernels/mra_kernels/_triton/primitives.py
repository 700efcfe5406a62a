"""What several kernels do alike. Softmax runs in base 2; offsets between rows are 64-bit."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Columns of the table of block rows, see `mask_tables.MaskTables.rows`.
WHOLE_FIRST = tl.constexpr(0)
WHOLE_STOP = tl.constexpr(1)
SEEN_FIRST = tl.constexpr(2)
SEEN_STOP = tl.constexpr(3)
QUERIES = tl.constexpr(4)
PADDING = tl.constexpr(5)
STARVING = tl.constexpr(6)
ROW_FACTS = tl.constexpr(8)


@triton.jit
def load_rows(base, rows, stride, inside, D: tl.constexpr, DP: tl.constexpr):
    """Rows of D adjacent numbers, ``[rows, DP]``; 0 where not ``inside`` and beyond D."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def afresh(tile, length):
    """``tile``, for what comes after a loop: compilers don't know that ``length`` isn't negative,
    so they work addresses out again instead of keeping them in registers all along."""
    return tile + tl.minimum(length, 0)


@triton.jit
def floor_div(x, by: tl.constexpr):
    """Rounded down below zero, too, where ``//`` rounds up as in C."""
    return tl.where(x < 0, x - by + 1, x) // by


@triton.jit
def store_rows(base, rows, stride, values, inside, D: tl.constexpr, DP: tl.constexpr):
    """Rows of D adjacent numbers, where ``inside``."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def row_dots(
    x, X, x_inside, y, Y, y_inside, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Dot products ``[x, y]`` of tiles of rows, each loaded from the rows that start at ``X`` or
    ``Y``.

    Without tensor cores operands stand in registers, where whole rows of float32 don't fit: those
    are read again, 32 features at a time.
    """
    STEP: tl.constexpr = 32 if PRECISION == "ieee" else 64
    if x.dtype != tl.float32 or DP <= STEP:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        dots = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        for first in tl.range(0, DP, STEP):
            d = first + tl.arange(0, STEP)
            of_x = tl.load(X[:, None] + d, mask=x_inside[:, None] & (d < D), other=0.0)
            of_y = tl.load(Y[:, None] + d, mask=y_inside[:, None] & (d < D), other=0.0)
            dots = tl.dot(of_x, tl.trans(of_y), dots, input_precision=PRECISION)
        return dots


@triton.jit
def tanh(x):
    """Accurate for small ``x``, too, where ``1 - 2 / (1 + exp 2x)`` cancels.

    No product meets a sum but in ``fma``: compilers have no choice of what to fuse, so every kernel
    that scores a pair finds the same score.
    """
    square = x * x
    series = tl.fma(square, 62 / 2835, -17 / 315)
    series = tl.fma(square, series, 2 / 15)
    series = tl.fma(square, series, -1 / 3)
    small = x * tl.fma(square, series, 1.0)
    decay = tl.math.exp2(-2 * LOG2_E * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))


@triton.jit
def logits_of(dots, scaling, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(scaling * dots / softcap)``, or without soft-cap ``scaling * dots``."""
    logits = dots * scaling
    if CAPPED:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def cap_slope(logits, softcap):
    """Derivative of soft-capped logits with respect to those before."""
    level = logits / softcap
    return 1 - level * level


@triton.jit
def softmax_step(logits, values, peak, mass, weighted, PRECISION: tl.constexpr):
    """Online softmax over one more tile of base-2 ``logits``, any of which may be -inf.

    ``peak``, ``mass`` ``[rows]`` and ``weighted`` ``[rows, DVP]`` are float32.
    """
    higher = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    decay = tl.math.exp2(peak - base)
    weights = tl.math.exp2(logits - base[:, None])
    mass = mass * decay + tl.sum(weights, 1)
    weighted = weighted * decay[:, None]
    weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
    return higher, mass, weighted


@triton.jit
def softmax_step_whole(dots, scale, values, peak, mass, weighted, PRECISION: tl.constexpr):
    """`softmax_step` where nothing is masked and ``scale > 0``, folded into the exponent."""
    higher = tl.maximum(peak, tl.max(dots, 1) * scale)
    decay = tl.math.exp2(peak - higher)
    weights = tl.math.exp2(dots * scale - higher[:, None])
    mass = mass * decay + tl.sum(weights, 1)
    weighted = weighted * decay[:, None]
    weighted = tl.dot(weights.to(values.dtype), values, weighted, input_precision=PRECISION)
    return higher, mass, weighted


@triton.jit
def load_norm(NORM, at, inside):
    """What base-2 logits are reduced by; +inf where a row sees nothing."""
    norm = tl.load(NORM + at, mask=inside, other=float("inf"))
    return tl.where(norm == float("-inf"), float("inf"), norm)


@triton.jit
def merged_mass(peak, mass, other, more):
    """Two softmaxes, peaks in base 2, as one: peak, mass, and what scales the values of each."""
    higher = tl.maximum(peak, other)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    mine, theirs = tl.math.exp2(peak - base), tl.math.exp2(other - base)
    return higher, mass * mine + more * theirs, mine, theirs


@triton.jit
def merged(peak, mass, weighted, other, more, added):
    """The same with their weighted values."""
    peak, mass, mine, theirs = merged_mass(peak, mass, other, more)
    return peak, mass, weighted * mine[:, None] + added * theirs[:, None]


@triton.jit
def block_row_facts(ROWS, row, inside):
    """Columns ``[whole first, whole stop)`` and ``[seen first, seen stop)`` of block rows."""
    at = ROWS + row.to(tl.int64) * ROW_FACTS
    return (
        tl.load(at + WHOLE_FIRST, mask=inside, other=0),
        tl.load(at + WHOLE_STOP, mask=inside, other=0),
        tl.load(at + SEEN_FIRST, mask=inside, other=0),
        tl.load(at + SEEN_STOP, mask=inside, other=0),
    )


@triton.jit
def run_of_rows(first, stop, inside, cols, STEP: tl.constexpr):
    """The columns any of several rows of blocks has to do with: from a multiple of ``STEP`` on, and
    one past the last."""
    begin = tl.min(tl.where(inside & (first < stop), first, cols), 0)
    end = tl.max(tl.where(inside & (first < stop), stop, 0), 0)
    return begin // STEP * STEP, end
