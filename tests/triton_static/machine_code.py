"""Machine code: of NVIDIA's GPUs disassembled by what comes with Triton, of AMD's as text."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*)(.*)"
)
_LABEL = re.compile(r"^\s*(\.L(?:_|BB)\w+):")
_TARGET = re.compile(r"(\.L(?:_|BB)\w+)")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)(.*)")
_BRANCH = re.compile(r"BRA|s_c?branch\w*")
_MATRIX = re.compile(r"HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|OMMA|DMMA|UTC\w*MMA|v_mfma\w*")
_AHEAD = re.compile(r"LDGSTS|UTMALDG|UBLKCP|(buffer|global)_load\w*")
"""Loads that are waited for later: on NVIDIA's, copies to shared memory."""


@dataclass(frozen=True)
class Code:
    """Of one kernel; the fields are those of `compiled.Compiled`."""

    registers: int
    spills: int
    loop_spills: int
    matrix: Mapping[str, int]
    pipelined: bool
    instructions: int
    loop: int
    longest: int


def nvidia(cubin: bytes) -> Code:
    """Of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    names, loops = _loops(text, _INSTRUCTION)
    total, bodies = Counter(names), _bodies(names, loops)
    spills, in_loops = (x["STL"] + x["LDL"] for x in (total, sum(bodies, Counter())))
    return _code(int(registers.group(1)), spills, in_loops, len(names), bodies)


def amd(text: str) -> Code:
    """Of a kernel's assembly."""

    def last(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    names, loops = _loops(text, _AMD_INSTRUCTION)
    bodies = _bodies(names, loops)
    in_loops = sum(n for body in bodies for name, n in body.items() if name.startswith("scratch_"))
    return _code(last("vgpr_count"), last("vgpr_spill_count"), in_loops, len(names), bodies)


def _code(
    registers: int, spills: int, in_loops: int, instructions: int, bodies: list[Counter[str]]
) -> Code:
    hot = max(bodies, key=_heat, default=Counter())
    ahead = any(_AHEAD.match(name) for name in hot)
    heavy = [sum(body.values()) for body in bodies if _matrix(body) or not _matrix(hot)]
    longest = max(heavy, default=0)
    return Code(
        registers, spills, in_loops, _matrix(hot), ahead, instructions, sum(hot.values()), longest
    )


def _matrix(body: Counter[str]) -> dict[str, int]:
    return {name: n for name, n in body.items() if _MATRIX.fullmatch(name)}


def _heat(body: Counter[str]) -> tuple[int, int]:
    """Most matrix instructions, the shortest of those; where there are none, the longest."""
    matrix = sum(_matrix(body).values())
    return matrix, -sum(body.values()) if matrix else sum(body.values())


def _loops(text: str, instruction: re.Pattern[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """Names of all instructions, and the first and last of every loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := instruction.match(line):
            name, rest = found.groups()
            if _BRANCH.fullmatch(name) and (target := _TARGET.search(rest)):
                branches.append((len(names), target.group(1)))
            names.append(name)
    loops = {(labels[to], at) for at, to in branches if labels.get(to, at) < at}
    return names, sorted(loops)


def _bodies(names: list[str], loops: list[tuple[int, int]]) -> list[Counter[str]]:
    """Instructions of the innermost loops."""
    inner = [
        loop
        for loop in loops
        if not any(loop != other and loop[0] <= other[0] <= other[1] <= loop[1] for other in loops)
    ]
    return [Counter(names[first : last + 1]) for first, last in inner]


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    run = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return run.stdout
