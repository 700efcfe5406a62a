"""The kernels' own IR, run on the CPU, on random calls against float64."""

from __future__ import annotations

import os

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from triton_cases import SETTINGS, on_random_calls  # noqa: E402
from triton_oracle import check, check_gradients  # noqa: E402

CASES = int(os.environ.get("MRA_KERNEL_CASES", "60"))
"""Random calls per setting, of results and of gradients; few at lengths in the thousands."""


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_results(setting):
    on_random_calls(setting, check, range(CASES if setting.limits else 3 + CASES // 75))


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.gradients], ids=lambda setting: setting.name
)
def test_gradients(setting):
    on_random_calls(setting, check_gradients, range(CASES))
