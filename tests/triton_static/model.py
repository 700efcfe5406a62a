"""What the kernels would take on a GPU, on paper: from their machine code, bytes and steps.

Nothing here was run on a GPU. A tile costs the busiest of four units, and what the others can't
hide behind it; dense attention costs what is published of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from triton_static.compiled import Compiled

HEADS = 32
"""Batch times heads; keys and values have as many."""
DERATE = 0.65
"""Share of the bound below that a kernel reaches: a dense Triton kernel's bound by the same rule is
604 and 627 TFLOP/s on an H100 at widths 64 and 128, and 403 and 395 were published."""
LAUNCH_MS = 0.004
LONE_CYCLES = 2.0
"""Cycles per instruction of a program that has a multiprocessor to itself, per scheduler."""


@dataclass(frozen=True)
class Gpu:
    """Peak rates; those of caches are estimates.

    Attributes:
        architecture: What kernels are compiled for.
        memory, cache: Bytes per second from memory and from the L2 cache.
        units: Multiprocessors.
        clock: Cycles per second.
        matrix: 16-bit FLOP per cycle and multiprocessor.
        dense: Published TFLOP/s of exact attention (16-bit, forward), by width and whether causal,
            at lengths of 512, 1k, 2k, 4k, 8k and 16k.
    """

    architecture: str
    memory: float
    cache: float
    units: int
    clock: float
    matrix: int
    dense: Mapping[tuple[int, bool], tuple[int, ...]]


GPUS = {
    "H100": Gpu(
        "sm_90", 3.35e12, 6.5e12, 132, 1.755e9, 4096,
        {
            (64, False): (333, 392, 460, 476, 496, 497),
            (128, False): (467, 565, 625, 638, 646, 648),
            (64, True): (197, 265, 371, 420, 460, 473),
            (128, True): (335, 415, 497, 550, 590, 610),
        },
    ),
    "A100": Gpu(
        "sm_80", 2.04e12, 4.5e12, 108, 1.41e9, 2048,
        {
            (64, False): (140, 165, 180, 187, 190, 190),
            (128, False): (170, 195, 210, 220, 225, 225),
            (64, True): (90, 120, 150, 165, 175, 180),
            (128, True): (110, 145, 175, 195, 205, 210),
        },
    ),
}  # fmt: skip


def dense_ms(gpu: Gpu, n: int, width: int, causal: bool) -> float:
    """Exact attention, by interpolation of what is published."""
    rates = gpu.dense[width, causal]
    place = min(max(math.log2(n / 512), 0.0), len(rates) - 1.0)
    low = min(int(place), len(rates) - 2)
    rate = rates[low] + (rates[low + 1] - rates[low]) * (place - low)
    programs = HEADS * math.ceil(n / 128)
    if programs < 4 * gpu.units:  # the last round of programs leaves units idle
        rate *= programs / (math.ceil(programs / gpu.units) * gpu.units)
    flop = 4 * HEADS * n * n * width * (0.5 if causal else 1)
    return max(flop / rate / 1e9, 8 * HEADS * n * width / gpu.memory * 1e3) + LAUNCH_MS


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a forward pass, by launch."""

    pool: float
    threshold: float
    open: float
    attend: float

    @property
    def total(self) -> float:
        return self.pool + self.threshold + self.open + self.attend


@dataclass(frozen=True)
class Call:
    """Which call; ``shared``: of the key blocks that a tile of queries opens, how many each of its
    rows of blocks opened on average (1: they agree)."""

    n: int
    width: int
    budget: float
    causal: bool = False
    side: int = 64
    shared: float = 1.0


def forward(
    gpu: Gpu, call: Call, kernels: Mapping[str, Compiled], sweeps: Mapping[str, int]
) -> Parts:
    """Of ``mra2``: scope ``head``, coarse ``pooled``, bfloat16.

    Args:
        gpu, call: Where, and what.
        kernels: Those of the call, by name.
        sweeps: How often programs go over all pairs of blocks: ``threshold`` by all of a head's
            programs, ``alone`` by the one that comes last, ``open``; counted by the executor.
    """
    n, width, blocks = call.n, call.width, math.ceil(call.n / call.side)
    read = 3 * HEADS * n * width * 2
    wrote = 3 * HEADS * blocks * width * 4
    pool = (read + wrote) / (0.8 * gpu.memory) * 1e3
    threshold, opener = kernels["head_threshold_kernel"], kernels["open_kernel"]
    chosen = _over_pairs(gpu, threshold, blocks, width, sweeps["threshold"])
    chosen += _alone(gpu, threshold, blocks, sweeps["alone"])
    opened = _over_pairs(gpu, opener, blocks, width, sweeps["open"])
    attend = _attend(gpu, kernels["forward_kernel"], call)
    return Parts(*(part + LAUNCH_MS for part in (pool, chosen, opened, attend)))


def _over_pairs(gpu: Gpu, kernel: Compiled, blocks: int, width: int, sweeps: int) -> float:
    """All programs score all pairs of blocks."""
    rows, cols = kernel.constants["RB"], kernel.constants["CB"]
    row_tiles = HEADS * math.ceil(blocks / rows)
    steps = math.ceil(blocks / cols) * sweeps
    cycles = max(kernel.longest * kernel.warps / 4, cols * width * 4 / _cache_rate(gpu))
    rounds = max(row_tiles, gpu.units) / gpu.units
    lone = kernel.longest * LONE_CYCLES * kernel.warps / 4
    return max(rounds * cycles / DERATE, lone) * steps / gpu.clock * 1e3


def _alone(gpu: Gpu, kernel: Compiled, blocks: int, sweeps: int) -> float:
    """One program per head scores all pairs of blocks."""
    steps = math.ceil(blocks / kernel.constants["RB"]) * math.ceil(blocks / kernel.constants["CB"])
    cycles = kernel.longest * LONE_CYCLES * kernel.warps / 4
    return steps * sweeps * cycles * max(1, HEADS / gpu.units) / gpu.clock * 1e3


def _attend(gpu: Gpu, kernel: Compiled, call: Call) -> float:
    rows, keys = kernel.constants["BM"], max(kernel.constants["BN"], call.side)
    tiles = HEADS * math.ceil(call.n / rows)
    area = 0.5 if call.causal else 1.0
    steps = call.budget * area * call.n / keys / call.shared
    steps = min(max(1.0, steps), area * call.n / keys) + (rows / keys if call.causal else 0)
    cycles = tile_cycles(gpu, kernel, call.width)[1] * (keys / kernel.constants["BN"])
    compute = tiles * steps * cycles / DERATE / (gpu.units * gpu.clock) * 1e3
    slots = gpu.units * kernel.programs
    compute *= math.ceil(tiles / slots) * slots / tiles if tiles < 10 * slots else 1.03
    memory = 4 * HEADS * call.n * call.width * 2 / gpu.memory * 1e3
    return max(compute, memory)


def tile_cycles(gpu: Gpu, kernel: Compiled, width: int) -> tuple[dict[str, float], float]:
    """Cycles of one tile of queries and keys: of each unit, and in all."""
    rows, keys = kernel.constants["BM"], kernel.constants["BN"]
    units = {
        "tensor cores": 4 * rows * keys * width / gpu.matrix,
        "instructions": kernel.loop * kernel.warps / 4,
        "exponentials": rows * keys / 16,
        "L2 cache": 2 * keys * width * 2 / _cache_rate(gpu),
    }
    busiest = max(units.values())
    # A program's products and softmax take turns; other programs fill some of the gaps.
    waiting = max(0.0, units["tensor cores"] + units["instructions"] - busiest)
    return units, busiest + waiting / kernel.programs


def _cache_rate(gpu: Gpu) -> float:
    """Bytes per cycle and multiprocessor."""
    return gpu.cache / gpu.units / gpu.clock


def break_even(
    gpu: Gpu, call: Call, kernels: Mapping[str, Compiled], sweeps: Mapping[str, int]
) -> int | None:
    """The shortest length from which on the call is always faster than dense attention; None if
    there is none up to 128k."""
    last = 0
    lengths = [*range(256, 4096, 64), *range(4096, 131073, 1024)]
    for n in lengths:
        one = Call(n, call.width, call.budget, call.causal, call.side, call.shared)
        if forward(gpu, one, kernels, sweeps).total >= dense_ms(gpu, n, call.width, call.causal):
            last = n
    return None if last == lengths[-1] else next(n for n in lengths if n > last)
