"""How kernels are launched: tile shapes by (architecture, head width, dtype), no measuring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """How the attention kernels cut their work.

    Attributes:
        rows: Queries per tile, a multiple of 16.
        keys: Keys per step, a multiple of 16; blocks that are larger take several steps.
        warps: Warps per program.
        stages: Tiles of keys and values in flight.
        registers: Most that a thread may use (NVIDIA), so that programs share a multiprocessor;
            None: as many as the compiler likes.
        tight: ``backward_key`` works offsets of rows out at every step, an instruction or two each,
            instead of keeping them in registers.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    tight: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told of it."""
        capped = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **capped}

    def rows_for(self, query_rows: int) -> int:
        """At most four blocks of rows: so many a list tells apart."""
        return min(self.rows, 4 * query_rows)

    def keys_for(self, side: int) -> int:
        """The same of keys; fewer than a block: it takes several steps."""
        return min(self.keys, 4 * side)


_MI300 = (9, 4), (9, 5)
"""What torch reports for gfx942 and gfx950."""

_LARGE = (8, 0), (9, 0), (10, 0), (10, 3)
"""Programs may have more than 99 KB of shared memory."""

# Tiles for widths up to 64, 128 and 256.
_HALF = {
    "forward": (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "backward_query": (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    "backward_key": (Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)),
}
# Without tensor cores a thread holds all of its rows' and columns' operands: small tiles.
_FLOAT32 = {
    "forward": (Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
    "backward_query": (Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1)),
    "backward_key": (Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1, 168), Tiles(16, 16, 8, 1)),
}
# Four warps of 64 lanes may have 512 registers a lane, eight of them 256.
_MI300_HALF = {
    "forward": (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
    "backward_query": (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
    "backward_key": (Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 2), Tiles(16, 32, 4, 2)),
}
_MI300_FLOAT32 = {
    "forward": (Tiles(64, 32, 8, 1), Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1)),
    "backward_query": (Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1)),
    "backward_key": (Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1)),
}

OVERRIDES: dict[tuple[str, int, torch.dtype], Tiles] = {}
"""Tiles to use instead of the table's, by (kernel, padded head width, dtype); kernel is
``forward``, ``backward_query``, ``backward_key``, ``keys_tail`` or ``keys_forward``."""


def tiles(kernel: str, query: Tensor, value: Tensor, query_rows: int) -> Tiles:
    """The tiles of ``kernel`` for these inputs, on their device."""
    width = max(padded(query.shape[-1]), padded(value.shape[-1]))
    chosen = OVERRIDES.get((kernel, width, query.dtype))
    return chosen or table(kernel, capability(query.device), width, query.dtype, query_rows)


def table(
    kernel: str, capability: tuple[int, int], width: int, dtype: torch.dtype, query_rows: int
) -> Tiles:
    """The table, judged by what compilers make of it (``tests/triton_static``), not by timing.

    Args:
        kernel: ``forward``, ``backward_query`` or ``backward_key``.
        capability: Major and minor compute capability.
        width: Padded width of heads, the wider of keys and values.
        dtype: Of the inputs.
        query_rows: Queries that share a list.
    """
    place = 0 if width <= 64 else 1 if width <= 128 else 2
    if capability in _MI300:
        return (_MI300_FLOAT32 if dtype.itemsize > 2 else _MI300_HALF)[kernel][place]
    if dtype.itemsize > 2:
        return _FLOAT32[kernel][place]
    shared = query_rows >= 128 and width <= 128
    if kernel == "backward_query" and shared and capability == (9, 0) and width > 64:
        return Tiles(128, 64, 8, 2)
    if kernel == "forward" and shared and _gains_from_wide_tiles(capability, width):
        registers = 128 if capability == (9, 0) and width <= 64 else None
        return Tiles(128, 64, 8, 2, registers)
    if capability == (9, 0) and (kernel, place) == ("forward", 1):
        return Tiles(64, 64, 4, 2)
    if capability[0] in (9, 10) and (kernel, place) == ("backward_key", 1):
        return Tiles(64, 64, 8, 2, tight=True)
    if capability[0] == 12 and (kernel, place) == ("backward_key", 0):
        return Tiles(32, 64, 4, 2)
    if capability not in _LARGE and (kernel, place) == ("backward_query", 2):
        return Tiles(32, 32, 8, 2)
    return _HALF[kernel][place]


def _gains_from_wide_tiles(capability: tuple[int, int], width: int) -> bool:
    """Where tiles of 64 queries wait for the L2 cache, or leave room for one program anyway."""
    return width > 64 or (9, 0) <= capability < (12, 0)


def key_tiles(kernel: str, query: Tensor, value: Tensor) -> Tiles:
    """The same of single keys: ``keys_tail``, whose rows are mean queries, or ``keys_forward``,
    whose rows are those of a block, and whose keys come one by one."""
    width = max(padded(query.shape[-1]), padded(value.shape[-1]))
    chosen = OVERRIDES.get((kernel, width, query.dtype))
    if chosen is not None:
        return chosen
    half = query.dtype.itemsize <= 2
    if kernel == "keys_tail":
        halves = Tiles(32 if width <= 128 else 16, 64 if width <= 64 else 32, 4, 2)
        return halves if half else Tiles(16, 32, 8, 1)
    if half:
        return Tiles(16, 64 if width <= 128 else 32, 4, 2)
    return Tiles(16, 32, 4, 1) if width <= 64 else Tiles(16, 16, 8, 1)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an A100 where there is none, to run on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def padded(width: int) -> int:
    """The power of two that tiles of this width take, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def precision() -> str:
    """How products of float32 numbers are computed: as torch's own are allowed to be."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def mean_precision(device: torch.device) -> str:
    """The same of block means: three products on tensor cores, where that is as good as float32."""
    amd = torch.version.hip is not None or capability(device) in _MI300
    return "ieee" if amd else "tf32x3"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Launches on the device of the first tensor."""
    LAUNCHER(kernel, grid, arguments, settings)


def on_device(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], settings: dict[str, Any]
) -> None:
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **settings)
    else:
        kernel[grid](*arguments, **settings)


LAUNCHER: Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None] = on_device
"""Who runs a kernel; tests put an executor or a counter here."""
