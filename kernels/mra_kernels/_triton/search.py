"""Which keys a budget pays for, of those that a program holds at once."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.pairs import NOTHING

_DIGIT = tl.constexpr(3)
_VALUES = tl.constexpr(8)
"""Bits of the key sought that a turn finds, and what they can be."""


@triton.jit
def _extremes(key, chosen):
    """Lowest and highest key of each row that is chosen."""
    return tl.min(tl.where(chosen, key, NOTHING), 1), tl.max(tl.where(chosen, key, -1), 1)


@triton.jit
def lowest_paid(key, cost, budget):
    """The lowest key from which on ``budget`` pays, of each row of a tile.

    ``cost`` is int32, 0 for what doesn't compete. Of the keys among which the one sought is, those
    are kept that agree with it in the next digit in which they differ at all.
    """
    left = tl.minimum(tl.maximum(budget, -1), 0x7FFFFFFF).to(tl.int32)
    lowest = tl.where(left < 0, NOTHING, tl.zeros_like(budget))
    searching = (left >= 0) & (tl.sum(cost, 1) > left)
    bottom, top = _extremes(key, cost > 0)
    while tl.max(searching.to(tl.int32), 0) > 0:
        # The exponent of a float is the place of the highest bit, or one more where it was rounded.
        differing = tl.maximum(top ^ bottom, 1).to(tl.float32).to(tl.int32, bitcast=True)
        shift = tl.maximum((differing >> 23) - 127 - (_DIGIT - 1), 0)
        low = (top >> (shift + _DIGIT)) << (shift + _DIGIT)
        place = (key - low[:, None]) >> shift[:, None]
        # Not all keys that share the leading digits: those above the top are paid for already.
        here = tl.where((key >= bottom[:, None]) & (key <= top[:, None]), cost, 0)
        digit = tl.zeros_like(left)
        spent = tl.zeros_like(left)
        for each in tl.static_range(1, _VALUES):
            above = tl.sum(tl.where(place >= each, here, 0), 1)
            digit += (above > left).to(tl.int32)
            spent = tl.maximum(spent, tl.where(above > left, 0, above))
        left -= spent
        bottom, top = _extremes(key, (place == digit[:, None]) & (here > 0))
        ends = searching & (bottom == top)
        lowest = tl.where(ends, top + 1, lowest)
        searching = searching & (bottom < top)
    return lowest
