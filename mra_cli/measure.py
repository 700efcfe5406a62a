"""Approximation error, latency and memory of single attention calls. Pure functions."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

_PAIRS, _ENOUGH_MS = 3, 500.0


def relative_error(output: Tensor, exact: Tensor, valid_rows: Tensor) -> Tensor:
    """``||output - exact||_F / ||exact||_F`` per head over real rows.

    Args:
        output, exact: ``[B, H, N, Dv]``.
        valid_rows: Bool ``[B, N]``.

    Returns:
        Float64 ``[B, H]``.
    """
    keep = valid_rows[:, None, :, None]
    difference = ((output.double() - exact.double()) * keep).flatten(2).norm(dim=-1)
    norm = (exact.double() * keep).flatten(2).norm(dim=-1)
    return difference / norm.clamp(min=torch.finfo(torch.float64).tiny)


def captured_mass(lse: Tensor, exact_lse: Tensor, valid_rows: Tensor) -> Tensor:
    """Share of the exact softmax's mass that lies on exactly computed entries, mean over real rows.

    Args:
        lse: Log-sum-exp of the exactly computed logits, ``[B, H, N]``.
        exact_lse: The same over all logits.
        valid_rows: Bool ``[B, N]``.

    Returns:
        Float64 ``[B, H]``.
    """
    keep = valid_rows[:, None]
    share = torch.exp(lse.double() - exact_lse.double()).masked_fill(~keep, 0.0)
    return share.sum(-1) / keep.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class PairedTimes:
    """Milliseconds of two functions that took turns: A B A B.

    Attributes:
        first_ms, second_ms: One number per pair, in the order they were taken.
    """

    first_ms: tuple[float, ...]
    second_ms: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median over pairs of the first's time by the second's: drift of the machine cancels."""
        return statistics.median(a / b for a, b in zip(self.first_ms, self.second_ms, strict=True))


def paired_times_ms(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    pairs: int = _PAIRS,
    enough_ms: float = _ENOUGH_MS,
) -> PairedTimes:
    """Time two functions in turn, so that drift of the machine hits both.

    Args:
        first, second: Both must have run once before.
        pairs: Most pairs to take.
        enough_ms: No further pair once they took this long together; one is always taken.
    """
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < pairs and sum(map(sum, times)) < enough_ms:
        for function, out in zip((first, second), times, strict=True):
            out.append(elapsed_ms(function)[1])
    return PairedTimes(tuple(times[0]), tuple(times[1]))


def paired_latency_ms(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Median milliseconds of two functions: three pairs, or fewer if they take over half a second.

    Both must have run once before.
    """
    times = paired_times_ms(first, second)
    return statistics.median(times.first_ms), statistics.median(times.second_ms)


def elapsed_ms(function: Callable[[], T]) -> tuple[T, float]:
    """What ``function`` returns, and the milliseconds it took."""
    _synchronize()
    start = time.perf_counter()
    result = function()
    _synchronize()
    return result, (time.perf_counter() - start) * 1e3


def percentile(values: tuple[float, ...], share: float) -> float:
    """The value that ``share`` of ``values`` don't exceed, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def with_peak_bytes(function: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What ``function`` returns, and the most bytes of tensors alive at once that it made.

    The result counts. On the CPU, scratch space inside a single torch operation is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as live:
        result = function()
    return result, live.peak


def with_resident_bytes(function: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What ``function`` returns, and by how much memory really held grew at its highest.

    On Linux this sees what `with_peak_bytes` can't: scratch space inside one operation or a
    compiled kernel. It misses memory that the process held already and used again, so the truth
    is the larger of the two. None: the system does not tell.
    """
    if device.type != "cpu":
        return with_peak_bytes(function, device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand back what is free, or it would be used unseen
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError, LookupError):
        return function(), None
    result = function()
    return result, max(0, _status_bytes("VmHWM") - before)


def peak_process_bytes() -> int:
    """Most memory this process has held so far, on Linux since `with_resident_bytes`."""
    try:
        return _status_bytes("VmHWM")
    except (OSError, ValueError):
        import resource  # a Unix module; Linux would count what a parent held

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations return, from birth to death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self._alive:
                continue
            self._alive.add(key)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.current -= size


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
