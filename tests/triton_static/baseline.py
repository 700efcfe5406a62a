"""The figures of all kernels that are compiled, kept in ``baseline.json``.

``python tests/triton_static/baseline.py`` compiles them and writes the file.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import triton

from triton_static.cases import CASES, launches
from triton_static.compiled import Compiled, compiled

FILE = Path(__file__).with_name("baseline.json")
_BY_NAME = {case.name: case for case in CASES}


def groups() -> list[tuple[str, str]]:
    """Architecture and name of every case."""
    return [(architecture, case.name) for case in CASES for architecture in case.architectures]


def figures(architecture: str, case: str) -> dict[str, Compiled]:
    """The kernels of one case, by ``architecture case kernel``."""
    rows: dict[str, Compiled] = {}
    for launch in launches(_BY_NAME[case], architecture):
        row = compiled(launch.on(architecture), architecture)
        rows[f"{architecture} {case} {row.kernel}"] = row
    return rows


@functools.cache
def baseline() -> tuple[str, dict[str, Compiled]]:
    """The version of Triton that the file was written with, and its rows."""
    data = json.loads(FILE.read_text())
    return data["triton"], {name: Compiled(**row) for name, row in data["kernels"].items()}


def main() -> None:
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(int(os.environ.get("JOBS", "2"))) as pool:
        parts = pool.starmap(figures, groups(), chunksize=1)
    rows = {name: asdict(row) for part in parts for name, row in part.items()}
    FILE.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
