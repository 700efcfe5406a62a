"""Approximation error, latency and memory of single attention calls. Pure functions."""

from __future__ import annotations

import statistics
import sys
import time
import weakref
from collections.abc import Callable
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


def paired_latency_ms(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Median milliseconds of two functions, run in turn so that drift of the machine hits both.

    Three pairs, or fewer if they take over half a second. Both must have run once before.
    """
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < _PAIRS and sum(map(sum, times)) < _ENOUGH_MS:
        for function, out in zip((first, second), times, strict=True):
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            out.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


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


def peak_process_bytes() -> int:
    """Most memory this process has held so far."""
    import resource  # a Unix module

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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
