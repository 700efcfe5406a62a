"""The gate: what compilers make of the kernels for five architectures, without a GPU."""

from __future__ import annotations

import os
from fnmatch import fnmatch

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
triton = pytest.importorskip("triton")

from triton_static.baseline import baseline, figures, groups  # noqa: E402

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
"""What their matrix instructions are called; a tile too small gets slower ones on sm_90."""

BYTES = {
    "sm_80": "IMMA",
    "sm_90": "IGMMA",
    "sm_100": "UTCI",
    "sm_120": "IMMA",
    "gfx942": "v_mfma_i32",
}
"""The same of bytes: what estimates scores for single keys."""

MAIN = ("forward_kernel", "backward_query_kernel", "backward_key_kernel")
"""Where the time goes: in half types these must be pipelined and reach the tensor cores."""

ONE_PROGRAM = {
    "sm_*0 d128 forward_kernel": "8 warps, or it spills",
    "sm_80 d40 to 96 forward_kernel": "the same: padded to 128",
    "sm_80 d80 * forward_kernel": "the same: padded to 128",
    "* backward d80 * backward_*": "padded to 128: 8 warps and accumulators of 64 x 128",
    "* by row row_threshold_kernel": "8 warps: 64-bit keys of whole rows",
    "sm_100 d64 shared forward_kernel": "held to half of the registers it spills 18 instructions",
    "* d128 shared *": "an accumulator of 128 x 128",
    "sm_120 *d128 *": "99 KB of shared memory",
    "gfx942 *": "64 KB of shared memory, and accumulators in registers",
    "* backward d128 *backward_*": "8 warps and accumulators of 64 x 128",
    "* d256 *": "accumulators of 64 x 256",
    "* backward d128 *coarse_cols_kernel": "8 warps, or it spills",
    "* fp32 *": "no tensor cores: operands in registers",
}
"""Kernels that leave room for no second program on a multiprocessor, and why that is accepted."""

MMA_SYNC = {
    "sm_* decode *": "16 queries",
    "sm_* backward d256 backward_key_kernel": "32 keys: accumulators of 64 don't fit",
}
"""Kernels whose tiles are too small for the matrix instructions of Hopper and Blackwell."""

SPILLS = {
    "sm_100 d256 forward_kernel": "34 words; tiles without take 1.8 times the instructions",
    "sm_100 backward d256 backward_query_kernel": "119 words; the same, 1.6 times",
}
"""Kernels that spill, outside the loops where the time goes."""


def excepted(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.mark.parametrize(("architecture", "case"), groups())
def test_kernels_compile_well(architecture, case):
    version, before = baseline()
    for name, row in figures(architecture, case).items():
        assert row.programs >= 1, f"{name} can't be launched: {row}"
        assert row.programs >= 2 or excepted(name, ONE_PROGRAM), f"{name}: {row}"
        assert row.spills == 0 or excepted(name, SPILLS), f"{name} spills: {row}"
        if row.kernel in MAIN and "fp32" not in case:
            assert row.pipelined, f"{name} waits for its loads: {row}"
            assert row.loop_spills == 0, f"{name} spills in its loops: {row}"
            fast = "HMMA" if excepted(name, MMA_SYNC) else MATRIX[architecture]
            kinds = [kind for kind in row.matrix if kind.startswith(fast)]
            assert kinds, f"{name} misses the tensor cores: {row.matrix}"
        if case.startswith("mra "):
            of_bytes = row.kernel in ("estimate_kernel", "open_kernel")
            wanted = BYTES[architecture] if of_bytes else ("HMMA", "v_mfma_f32")
            assert any(kind.startswith(wanted) for kind in row.matrix), f"{name}: {row.matrix}"
            assert row.pipelined, f"{name} waits for its loads: {row}"
        if version == triton.__version__:
            known = before[name]
            better = "if that is wanted: make baseline"
            assert row.spills <= known.spills, f"{name} spills more than {known.spills}; {better}"
            assert row.loop <= known.loop * 1.05, (
                f"{name}: {row.loop} instructions in the loop, {known.loop} before; {better}"
            )


def test_the_baseline_is_of_these_kernels():
    _, before = baseline()
    prefixes = {f"{architecture} {case} " for architecture, case in groups()}
    assert {name.rpartition(" ")[0] + " " for name in before} == prefixes
