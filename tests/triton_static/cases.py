"""The calls whose kernels are compiled: the table of `tuning`, as the launchers read it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mra_kernels import AttentionMask, MraAttentionConfig, MraKeysConfig, mra_attention
from mra_kernels._triton import tuning
from triton_static.compiled import CAPABILITIES, TARGETS, Planned, recorded

N = 16384
"""Length of most calls: long enough for what is cut by length to be at its longest."""


@dataclass(frozen=True)
class Case:
    """A call; ``keys``: of single keys; ``kernels``: the only ones of it to look at, the others are
    those of another case."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    coarse: str = "pooled"
    query_rows: int | None = None
    backward: bool = False
    keys: bool = False
    n: int = N
    kernels: tuple[str, ...] = ()
    architectures: tuple[str, ...] = tuple(TARGETS)


_ATTEND = ("forward_kernel",)
_KEYS = ("tail_kernel", "attend_kernel")
_CHOOSE = ("choose_kernel",)
_TWO = ("sm_80", "sm_90")
_WIDE = ("sm_80", "sm_90", "sm_100", "sm_120")
CASES = [
    Case("d64"),
    Case("d128", width=128),
    Case("d64 shared", query_rows=128, kernels=_ATTEND, architectures=("sm_90", "sm_100")),
    Case("d128 shared", width=128, query_rows=128, kernels=_ATTEND, architectures=_WIDE),
    Case("d64 512 tokens", n=512, kernels=_CHOOSE, architectures=_TWO),
    Case("d64 1k", n=1024, kernels=_CHOOSE),
    Case("d128 1k", width=128, query_rows=64, n=1024, kernels=_CHOOSE, architectures=_TWO),
    Case(
        "backward d128 shared",
        width=128,
        query_rows=128,
        backward=True,
        kernels=("backward_query_kernel",),
        architectures=("sm_90",),
    ),
    Case("backward d64", backward=True),
    Case("backward d128", width=128, backward=True),
    Case("d64 per_query", coarse="per_query", kernels=_ATTEND, architectures=_TWO),
    Case("d256", width=256, kernels=_ATTEND, architectures=_TWO),
    Case("fp32 d64", torch.float32, kernels=_ATTEND, architectures=_TWO),
    Case("fp32 d128", torch.float32, width=128, kernels=_ATTEND, architectures=_TWO),
    Case("mra d64", keys=True, kernels=("estimate_kernel", "open_kernel", *_KEYS)),
    Case("mra d128", width=128, keys=True, kernels=_KEYS, architectures=_TWO),
]


@contextmanager
def _as_on(architecture: str) -> Iterator[None]:
    before = tuning.capability, tuning.LAUNCHER
    tuning.capability = lambda device: CAPABILITIES[architecture]
    tuning.LAUNCHER = lambda kernel, grid, args, settings: kernel[grid](*args, **settings)
    try:
        yield
    finally:
        tuning.capability, tuning.LAUNCHER = before


def launches(case: Case, architecture: str) -> list[Planned]:
    """What the call launches there; nothing is run, and nobody looks at results."""
    query = torch.zeros(1, 2, case.n, case.width, dtype=case.dtype)
    key, value = (torch.zeros(1, 1, case.n, case.width, dtype=case.dtype) for _ in range(2))
    config = MraAttentionConfig(
        resolutions=(32, 1), budget=0.1, coarse=case.coarse, query_rows=case.query_rows
    )
    if case.keys:
        config = MraKeysConfig(budget=0.1)
    mask = AttentionMask.causal(case.n)
    for tensor in (query, key, value):
        tensor.requires_grad_(case.backward)
    with _as_on(architecture), recorded() as planned:
        output = mra_attention(query, key, value, config=config, mask=mask, impl="triton").output
        if case.backward:
            planned.clear()
            output.backward(output.detach())
    chosen = [p for p in planned if not case.kernels or p.kernel.fn.__name__ in case.kernels]
    assert chosen, f"{case.name} launches none of {case.kernels}"
    return chosen
