"""What ``mra`` (single keys) would take on a GPU, on paper: as `model`, with other kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from triton_static.compiled import Compiled
from triton_static.model import DERATE, HEADS, LAUNCH_MS, Call, Gpu, cache_rate

ROWS = 16
"""Queries per block."""
FEATURE_OPS = 147
"""Operations of torch that make features, a launch each (counted by a test)."""
FEATURE_BYTES = {64: 5622, 128: 9034}
"""What they read and write per token and head, by width (counted by the same test)."""
LISTING = 504
"""Instructions per warp in which `attend_kernel` lists the opened ones of 1024 keys, read off its
machine code for both architectures: its outer loop less its inner one."""


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a forward pass."""

    features: float
    pool: float
    estimate: float
    limit: float
    open: float
    tail: float
    attend: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def forward(gpu: Gpu, call: Call, kernels: Mapping[str, Compiled]) -> Parts:
    """Of ``mra`` in bfloat16; ``kernels`` are those of the call, by name."""
    n, width = call.n, call.width
    area = 0.5 if call.causal else 1.0
    blocks = HEADS * math.ceil(n / ROWS)
    estimate, opener = kernels["estimate_kernel"], kernels["open_kernel"]
    tail, attend = kernels["tail_kernel"], kernels["attend_kernel"]
    stream = 0.8 * gpu.memory / 1e3
    bits = HEADS * n / ROWS * n / 8 * area
    features = FEATURE_OPS * LAUNCH_MS + HEADS * n * FEATURE_BYTES[width] / stream

    rows, keys = estimate.constants["BM"], estimate.constants["BN"]
    tiles = HEADS * math.ceil(n / rows)
    units = {
        "tensor cores": 2 * rows * keys * 32 / (2 * gpu.matrix),  # of bytes: twice as fast
        "L2 cache": keys * 32 / cache_rate(gpu),
    }
    sampled = tiles * (area * n / 8 / 64 + 3)  # and three chunks that count singly
    all_keys = tiles * area * n / keys
    log_sums = _steps_ms(gpu, estimate, sampled, estimate.longest, units)
    counting = _steps_ms(gpu, estimate, all_keys, estimate.loop, units)
    opening = _steps_ms(gpu, opener, all_keys, opener.loop, units) + bits / stream

    rows, keys = tail.constants["RB"], tail.constants["BN"]
    steps = math.ceil(blocks / rows) * area * n / keys
    units = {
        "tensor cores": 5 * 2 * rows * keys * width / gpu.matrix,
        "exponentials": rows * keys / 16,
        "L2 cache": 2 * keys * width * 2 / cache_rate(gpu),
    }
    tails = _steps_ms(gpu, tail, steps, tail.loop, units)

    keys = attend.constants["BN"]
    steps = blocks * (call.budget * area * n / keys + 0.5)
    units = {
        "tensor cores": 4 * ROWS * keys * width / gpu.matrix,
        "exponentials": ROWS * keys / 16,
        "L2 cache": 2 * keys * width * 2 / cache_rate(gpu),
    }
    listing = _steps_ms(gpu, attend, blocks * math.ceil(area * n / 1024), LISTING, {})
    attending = _steps_ms(gpu, attend, steps, attend.loop, units) + listing
    pool = HEADS * n * width * 2 / stream
    limit = HEADS * n / ROWS * 128 * 4 / stream
    parts = (pool, log_sums + counting, limit, opening, tails, attending)
    return Parts(features, *(part + LAUNCH_MS for part in parts))


def _steps_ms(
    gpu: Gpu, kernel: Compiled, steps: float, instructions: int, units: Mapping[str, float]
) -> float:
    """So many turns of a loop: the busiest unit, and what tensor cores and instructions can't hide
    behind each other, over the programs that share a multiprocessor."""
    issue = instructions * kernel.warps / 4
    matrix = units.get("tensor cores", 0.0)
    busiest = max(issue, *units.values(), 0.0)
    cycles = busiest + max(0.0, matrix + issue - busiest) / kernel.programs
    return steps * cycles / DERATE / (gpu.units * gpu.clock) * 1e3
