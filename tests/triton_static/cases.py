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
    those of another case; ``queries``, ``value_width``: None: as many, as wide, as the keys."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    width: int = 64
    value_width: int | None = None
    side: int = 32
    coarse: str = "pooled"
    scope: str = "head"
    queries: int | None = None
    query_rows: int | None = None
    backward: bool = False
    keys: bool = False
    n: int = N
    kernels: tuple[str, ...] = ()
    architectures: tuple[str, ...] = tuple(TARGETS)


_ATTEND = ("forward_kernel",)
_GRADIENTS = ("backward_query_kernel", "backward_key_kernel")
_PER_QUERY = ("backward_query_kernel", "coarse_cols_kernel")
_KEYS = ("tail_kernel", "attend_kernel")
_CHOOSE = ("choose_kernel",)
_TWO = ("sm_80", "sm_90")
_SMALL_TOO = ("sm_80", "sm_90", "sm_120", "gfx942")
_FP32 = torch.float32
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
    Case("d64 per_query", coarse="per_query", kernels=_ATTEND),
    Case("d64 none by row", coarse="none", scope="row", architectures=_TWO),
    Case("d16", width=16, kernels=_ATTEND, architectures=_TWO),
    Case("d32 side 16", width=32, side=16, kernels=_ATTEND, architectures=_TWO),
    Case("d40 to 96", width=40, value_width=96, kernels=_ATTEND, architectures=_TWO),
    Case("d80 side 64", width=80, side=64, kernels=_ATTEND, architectures=_TWO),
    Case("d256", width=256, kernels=_ATTEND),
    Case("decode d64", queries=1, kernels=_ATTEND, architectures=_TWO),
    Case("decode d128", width=128, queries=16, kernels=_ATTEND, architectures=_TWO),
    Case("fp32 d64", _FP32, kernels=_ATTEND, architectures=_TWO),
    Case("fp32 d128 side 64", _FP32, width=128, side=64, kernels=_ATTEND, architectures=_TWO),
    Case("fp32 d256", _FP32, width=256, kernels=_ATTEND, architectures=_TWO),
    Case(
        "fp32 d128 per_query", _FP32, width=128, coarse="per_query", kernels=_ATTEND,
        architectures=_TWO,
    ),
    Case("backward d64 per_query", coarse="per_query", backward=True, kernels=_PER_QUERY),
    Case(
        "backward d128 per_query", width=128, coarse="per_query", backward=True,
        kernels=_PER_QUERY, architectures=("sm_90", "sm_120"),
    ),
    Case("backward d16", width=16, backward=True, kernels=_GRADIENTS, architectures=_TWO),
    Case(
        "backward d80 to 40", width=80, value_width=40, side=64, backward=True, kernels=_GRADIENTS,
        architectures=_TWO,
    ),
    Case("backward d256", width=256, backward=True),
    Case("backward fp32 d64", _FP32, backward=True, kernels=_GRADIENTS, architectures=_SMALL_TOO),
    Case(
        "backward fp32 d128", _FP32, width=128, backward=True, kernels=_GRADIENTS,
        architectures=_SMALL_TOO,
    ),
    Case(
        "backward fp32 d256", _FP32, width=256, backward=True, kernels=_GRADIENTS,
        architectures=_TWO,
    ),
    Case("mra d64", keys=True, kernels=("estimate_kernel", "open_kernel", *_KEYS)),
    Case("mra d128", width=128, keys=True, kernels=_KEYS, architectures=_TWO),
]  # fmt: skip


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
    queries = case.queries or case.n
    query = torch.zeros(1, 2, queries, case.width, dtype=case.dtype)
    key = torch.zeros(1, 1, case.n, case.width, dtype=case.dtype)
    value = torch.zeros(1, 1, case.n, case.value_width or case.width, dtype=case.dtype)
    config = MraAttentionConfig(
        resolutions=(case.side, 1), budget=0.1, coarse=case.coarse, scope=case.scope,
        query_rows=case.query_rows,
    )  # fmt: skip
    if case.keys:
        config = MraKeysConfig(budget=0.1)
    mask = AttentionMask.causal(queries, case.n, offset=case.n - queries)
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
