"""The kernels' own IR, run on the CPU, on random calls against float64."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from triton_cases import SETTINGS, calls, check, check_gradients, launched_by, plainly  # noqa: E402
from triton_cpu import Executor  # noqa: E402

CASES = int(os.environ.get("MRA_KERNEL_CASES", "40"))
"""Random calls per setting; a tenth of them at lengths in the thousands."""


def on_random_calls(setting, examine, examples):
    @settings(
        max_examples=max(3, examples),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.data())
    def run(data):
        call = data.draw(calls(setting))
        with Executor(ones=False), launched_by(plainly, setting.in_tiles):
            examine(call)

    run()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_results(setting):
    on_random_calls(setting, check, CASES // 10 if setting.lengths[1] > 1000 else CASES)


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.gradients], ids=lambda setting: setting.name
)
def test_gradients(setting):
    on_random_calls(setting, check_gradients, CASES // 3)
