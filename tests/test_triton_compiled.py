"""The gate: what compilers make of the kernels for five architectures, without a GPU."""

from __future__ import annotations

import os

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
triton = pytest.importorskip("triton")

from triton_static.baseline import baseline, figures, groups  # noqa: E402

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
"""What their matrix instructions are called; a tile too small gets slower ones on sm_90."""

MAIN = ("forward_kernel", "backward_query_kernel", "backward_key_kernel")
"""Where the time goes: these must be pipelined, and reach tensor cores in half types."""

ONE_PROGRAM: dict[str, str] = {}
"""Kernels that leave room for no second program on a multiprocessor, and why that is accepted."""


@pytest.mark.parametrize(("architecture", "case"), groups(), ids=" ".join)
def test_kernels_compile_well(architecture, case):
    version, before = baseline()
    for name, row in figures(architecture, case).items():
        assert row.spills == 0, f"{name} spills: {row}"
        assert row.programs >= 1, f"{name} can't be launched: {row}"
        assert row.programs >= 2 or name in ONE_PROGRAM, f"{name}: {row}"
        if row.kernel in MAIN:
            assert row.pipelined, f"{name} waits for its loads: {row}"
            if "fp32" not in case:
                kinds = [kind for kind in row.matrix if kind.startswith(MATRIX[architecture])]
                assert kinds, f"{name} misses the tensor cores: {row.matrix}"
        if version == triton.__version__:
            allowed = before[name].loop * 1.05
            assert row.loop <= allowed, (
                f"{name}: {row.loop} instructions in the loop, {before[name].loop} before; if that "
                "is wanted: make baseline"
            )


def test_the_baseline_is_of_these_kernels():
    _, before = baseline()
    prefixes = {f"{architecture} {case} " for architecture, case in groups()}
    assert {name.rpartition(" ")[0] + " " for name in before} == prefixes
