"""Did a method compute what it set out to? Its output against the same plan in float64.

Not to be mixed up with the approximation error, which compares with exact attention.
"""

from __future__ import annotations

import math

import torch

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.measure import relative_error
from mra_cli.methods import Method

MOST_ENTRIES = 1 << 26
"""Exact score entries that a check may take at all: some ten seconds of float64."""

ENOUGH_ENTRIES = 1 << 23
"""No further heads once they have so many together."""

NO_NUMBERS = 1e9
"""Stands for the error of an output that is not all numbers."""


def rounding_bound(dtype: torch.dtype) -> float:
    """Relative (Frobenius) distance from float64 that rounding can explain.

    1e-4 for computing in float32: a logit of 50, summed over 64 to 128 products, is off by up to
    50 x sqrt(128) x 2^-24 = 3e-5, and so is the weight that is its exponential; three times that
    for sums over keys. For half types 2.5 eps more: output, weights and pooled vectors are each
    rounded to the dtype by at most eps / 2, five times in all.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return 1e-4 + (2.5 * torch.finfo(dtype).eps if half else 0.0)


def heads_to_check(call: AttentionCall, result: AttentionResult) -> int:
    """How many heads (the first ones) can be checked in bearable time; 0: none."""
    heads = call.query.shape[1]
    per_head = max(1.0, float(result.density.mean()) * call.legal_entries / heads)
    group = heads // call.key.shape[1]  # heads that share keys go together
    if group * per_head > MOST_ENTRIES:
        return 0
    return min(heads, max(group, int(ENOUGH_ENTRIES / per_head) // group * group))


@torch.no_grad()
def distance_from_float64(
    method: Method, call: AttentionCall, result: AttentionResult, heads: int
) -> float:
    """The worst of the first ``heads`` heads."""
    expected = method.in_float64(call, result, heads)
    output = result.output[:, :heads].detach()
    return as_number(float(relative_error(output, expected, call.valid_rows).max()))


def as_number(error: float) -> float:
    """The error, or `NO_NUMBERS` where the output held NaN or infinities, which JSON can't say."""
    return error if math.isfinite(error) else NO_NUMBERS
