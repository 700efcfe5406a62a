"""How cost grows with length, and from which length on approximating pays. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FEWEST = 3
"""Lengths that a fit needs: a quadratic has three coefficients."""

LINEAR = 1.3
"""Growth exponent up to which a straight line through times means something."""


@dataclass(frozen=True)
class BreakEven:
    """The length from which on a method is faster than exact attention.

    Attributes:
        length: In keys; None: there is none, or none was found.
        note: Why there is none, or what to mind; empty if there is nothing to say.
    """

    length: float | None
    note: str = ""


def fitted_break_even(
    lengths: Sequence[int], exact_ms: Sequence[float], method_ms: Sequence[float]
) -> BreakEven:
    """Where a quadratic through the exact times meets a straight line through the method's.

    The 'efficiency length' of the Comprehensive Attention Benchmark (Zhang et al., ICML 2023,
    arXiv 2210.07661): least squares of ``a n^2 + b n + c`` and ``d n + e``, and the larger root of
    their difference. A method whose times grow faster than ``n ** LINEAR`` over its three longest
    lengths (any method at a fixed budget does, at last) gets a quadratic, too; the note says so.
    """
    longest = sorted(zip(lengths, method_ms, strict=True))[-FEWEST:]
    growth = growth_exponent(*zip(*longest, strict=True))
    if growth is None:
        return BreakEven(None, f"a fit needs {FEWEST} lengths, got {len(set(lengths))}")
    degree = 1 if growth <= LINEAR else 2
    notes = [] if degree == 1 else [f"both quadratic: N^{growth:.2f}"]
    exact = _polynomial(lengths, exact_ms, 2)
    method = [0.0] * (2 - degree) + _polynomial(lengths, method_ms, degree)
    a, b, c = (x - y for x, y in zip(exact, method, strict=True))
    discriminant = b * b - 4 * a * c
    if exact[0] * max(lengths) ** 2 <= 0.01 * max(exact_ms):
        return BreakEven(None, "exact attention did not grow quadratically")
    if a <= 0:
        return BreakEven(None, ", ".join(["slower from some length on", *notes]))
    root = (-b + math.sqrt(discriminant)) / (2 * a) if discriminant >= 0 else 0.0
    if root <= 0:
        return BreakEven(None, ", ".join(["faster at every length", *notes]))
    if not min(lengths) <= root <= max(lengths):
        notes.insert(0, "beyond the lengths measured")
    return BreakEven(root, ", ".join(notes))


def measured_break_even(lengths: Sequence[int], speedup: Sequence[float]) -> BreakEven:
    """The shortest measured length at which, and at all longer ones, a method is faster.

    Args:
        speedup: Exact time by the method's.
    """
    found = None
    for length, ratio in sorted(zip(lengths, speedup, strict=True), reverse=True):
        if ratio <= 1:
            break
        found = length
    if found is None:
        return BreakEven(None, f"slower at {max(lengths)}, the longest")
    return BreakEven(found, "the shortest measured" if found == min(lengths) else "")


def growth_exponent(lengths: Sequence[int], times_ms: Sequence[float]) -> float | None:
    """``p`` of ``time ~ length ** p``, by least squares of the logarithms; None under 3 lengths."""
    if len(set(lengths)) < FEWEST:
        return None
    logs = [math.log(length) for length in lengths]
    mean = sum(logs) / len(logs)
    spread = [x - mean for x in logs]
    return sum(x * math.log(t) for x, t in zip(spread, times_ms, strict=True)) / sum(
        x * x for x in spread
    )


def _polynomial(xs: Sequence[int], ys: Sequence[float], degree: int) -> list[float]:
    """Least-squares coefficients, highest power first. Solved at x / max(x), or squares of long
    lengths would swamp the rest."""
    scale = max(xs)
    x = torch.tensor(xs, dtype=torch.float64) / scale
    powers = torch.stack([x**k for k in range(degree, -1, -1)], 1)
    y = torch.tensor(ys, dtype=torch.float64)[:, None]
    solved = torch.linalg.lstsq(powers, y).solution[:, 0].tolist()
    return [c / scale**k for c, k in zip(solved, range(degree, -1, -1), strict=True)]
