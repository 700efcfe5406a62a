"""What the kernels would take on a GPU, on paper: from their machine code, bytes and steps.

Nothing here was run on a GPU. A tile costs the busiest of four units, and what the others can't
hide behind it; dense attention costs what is published of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mra_kernels._triton import selection
from mra_kernels._triton.threshold import CANDIDATES
from triton_static.compiled import Compiled

HEADS = 32
"""Batch times heads; keys and values have as many."""
DERATE = 0.65
"""Share of the bound below that a kernel reaches: a dense Triton kernel's bound by the same rule is
604 and 627 TFLOP/s on an H100 at widths 64 and 128, and 403 and 395 were published."""
LAUNCH_MS = 0.004
TURNS = 7
"""Of the search among the pairs of a short sequence: at most so many in hundreds of samples of
noise, 16 to 32 blocks, budgets of 5 to 25 %."""
LOOKALIKES = 0.056
"""Share of a head's pairs whose keys begin with the 12 bits of the threshold's, on normal noise at
10 %, at most: 15 bits, an eighth."""
SCAN = 350
"""Instructions to look through 2048 tallies, an estimate."""
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
    """Milliseconds of a forward pass, by launch; short sequences are chosen and opened in one."""

    pool: float
    choose: tuple[float, ...]
    attend: float

    @property
    def total(self) -> float:
        return self.pool + sum(self.choose) + self.attend

    @property
    def launches(self) -> int:
        return 2 + len(self.choose)


@dataclass(frozen=True)
class Call:
    """Which call; ``shared``: of the key blocks that a tile of queries opens, how many each of its
    rows of blocks opened on average (1: they agree); ``query_rows``: as in the config."""

    n: int
    width: int
    budget: float
    causal: bool = False
    side: int = 64
    shared: float = 1.0
    query_rows: int | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return math.ceil(self.n / (self.query_rows or self.side)), math.ceil(self.n / self.side)


def forward(
    gpu: Gpu, call: Call, kernels: Mapping[str, Compiled], sweeps: Mapping[str, int]
) -> Parts:
    """Of ``mra2``: scope ``head``, coarse ``pooled``, bfloat16.

    Args:
        gpu, call: Where, and what.
        kernels: Those of the call, by case and name.
        sweeps: How often programs go over all pairs of blocks: ``threshold`` by all of a head's
            programs, ``alone`` by the one that comes last, ``open``; counted by the executor.
    """
    n, width, (rows, cols) = call.n, call.width, call.blocks
    read = 3 * HEADS * n * width * 2
    wrote = HEADS * (rows + 2 * cols) * width * 4
    pool = (read + wrote) / (0.8 * gpu.memory) * 1e3
    short = _at_once_kernel(kernels, call)
    if short is not None:
        chosen = [_at_once(gpu, short)]
    else:
        threshold, opener = kernels["head_threshold_kernel"], kernels["open_kernel"]
        chosen = [_over_pairs(gpu, threshold, call.blocks, width, sweeps["threshold"])]
        chosen[0] += _alone(gpu, threshold, call.blocks, sweeps["alone"] + more_sweeps(call))
        chosen[0] += _search(gpu, kernels, call)
        chosen += [_over_pairs(gpu, opener, call.blocks, width, sweeps["open"])]
    wide = call.query_rows is not None and "shared forward_kernel" in kernels
    attend = _attend(gpu, kernels["shared forward_kernel" if wide else "forward_kernel"], call)
    return Parts(pool + LAUNCH_MS, tuple(part + LAUNCH_MS for part in chosen), attend + LAUNCH_MS)


def more_sweeps(call: Call) -> int:
    """How often the last program scores a head's pairs again, for three bits more, until the pairs
    that share the leading bits are few enough to be written down."""
    pairs = math.prod(call.blocks)
    alike = LOOKALIKES * pairs * (0.5 if call.causal else 1)
    alike /= 1 << (selection.first_bits(pairs) - 12)
    return max(0, math.ceil(math.log(alike / CANDIDATES, 8)))


def _search(gpu: Gpu, kernels: Mapping[str, Compiled], call: Call) -> float:
    """The last program looks through the tallies, and searches what it wrote down."""
    largest = _choosers(kernels)[-1]
    turn = largest.loop * CANDIDATES / (largest.constants["RB"] * largest.constants["CB"])
    scanned = SCAN * (1 << selection.first_bits(math.prod(call.blocks))) / 2048
    return (TURNS * turn + scanned) * LONE_CYCLES / gpu.clock * 1e3


def _choosers(kernels: Mapping[str, Compiled]) -> list[Compiled]:
    """The kernels that hold all pairs of a head, smallest first."""
    found = [kernel for name, kernel in kernels.items() if "choose" in name]
    return sorted(found, key=lambda kernel: kernel.constants["RB"] * kernel.constants["CB"])


def _at_once_kernel(kernels: Mapping[str, Compiled], call: Call) -> Compiled | None:
    """The smallest kernel compiled that holds all pairs of a head; None: a tile can't."""
    tile = selection.one_tile(*call.blocks, call.width, by_row=False)
    if tile is None:
        return None
    pairs = tile[0] * tile[1]
    fitting = (k for k in _choosers(kernels) if k.constants["RB"] * k.constants["CB"] >= pairs)
    return next(fitting)


def _at_once(gpu: Gpu, kernel: Compiled) -> float:
    """One program per head scores its pairs once, searches among them, and opens."""
    instructions = kernel.instructions + (TURNS - 1) * kernel.loop
    cycles = instructions * LONE_CYCLES * max(1, kernel.warps / 4)
    return cycles * math.ceil(HEADS / gpu.units) / gpu.clock * 1e3


def _over_pairs(
    gpu: Gpu, kernel: Compiled, blocks: tuple[int, int], width: int, sweeps: int
) -> float:
    """All programs score all pairs of blocks."""
    rows, cols = kernel.constants["RB"], kernel.constants["CB"]
    row_tiles = HEADS * math.ceil(blocks[0] / rows)
    steps = math.ceil(blocks[1] / cols) * sweeps
    cycles = max(kernel.longest * kernel.warps / 4, cols * width * 4 / cache_rate(gpu))
    rounds = max(row_tiles, gpu.units) / gpu.units
    lone = kernel.longest * LONE_CYCLES * kernel.warps / 4
    return max(rounds * cycles / DERATE, lone) * steps / gpu.clock * 1e3


def _alone(gpu: Gpu, kernel: Compiled, blocks: tuple[int, int], sweeps: int) -> float:
    """One program per head scores all pairs of blocks."""
    rows, cols = kernel.constants["RB"], kernel.constants["CB"]
    steps = math.ceil(blocks[0] / rows) * math.ceil(blocks[1] / cols)
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
        "L2 cache": 2 * keys * width * 2 / cache_rate(gpu),
    }
    busiest = max(units.values())
    # A program's products and softmax take turns; other programs fill some of the gaps.
    waiting = max(0.0, units["tensor cores"] + units["instructions"] - busiest)
    return units, busiest + waiting / kernel.programs


def cache_rate(gpu: Gpu) -> float:
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
        one = replace(call, n=n)
        if forward(gpu, one, kernels, sweeps).total >= dense_ms(gpu, n, call.width, call.causal):
            last = n
    return None if last == lengths[-1] else next(n for n in lengths if n > last)
