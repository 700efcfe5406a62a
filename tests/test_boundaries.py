"""Promises about what imports what, kept by looking at fresh processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mra_kernels", {"transformers", "typer", "rich", "mra_cli", "triton"}),
        ("import mra_cli.analyze, mra_cli.search, mra_cli.pages", {"typer", "rich", "matplotlib"}),
        ("import mra_cli.bench.model, mra_cli.bench.plots", {"typer", "rich", "matplotlib"}),
        (
            "import mra_cli.calibrate.calibrate, mra_cli.explain.measure, mra_cli.fold.fold",
            {"typer", "rich"},
        ),
        ("import mra_cli.cli.main", {"torch", "transformers", "scipy"}),
        ("import mra_cli", {"torch", "transformers", "typer", "rich"}),
    ],
)
def test_imports_run_one_way(statement, absent):
    assert not modules_after(statement) & absent


def test_the_check_above_can_fail():
    assert "torch" in modules_after("import mra_kernels")


def test_help_is_quick():
    """Under 0.3 s on an idle machine; the best of five, since machines are not always idle."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mra_cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


def test_kernels_is_a_bare_directory():
    """With an __init__.py it would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_private_names_of_transformers_stay_in_one_file():
    import re

    for path in (ROOT / "mra_cli").rglob("*.py"):
        if path.name != "host.py":
            assert not re.search(
                r"masking_utils|_global_mapping|_model_mapping|\b_attn_implementation",
                path.read_text(),
            )
