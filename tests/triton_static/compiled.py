"""Triton kernels compiled for GPUs that are not there, and what their machine code says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from triton_cpu import Specialization, specialize
from triton_cpu.run import cache_directory
from triton_static import machine_code

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}
CAPABILITIES["gfx942"] = (9, 4)  # as torch reports it


@dataclass(frozen=True)
class Machine:
    """What bounds how many programs a multiprocessor holds.

    Attributes:
        warps: Most of them resident.
        registers: 32-bit ones; of gfx942, per SIMD of 64-wide lanes.
        shared_bytes: For all programs.
        program_shared_bytes: For one.
        programs: Most of them resident.
    """

    warps: int
    registers: int
    shared_bytes: int
    program_shared_bytes: int
    programs: int


MACHINES = {
    "sm_80": Machine(64, 65536, 167936, 166912, 32),
    "sm_90": Machine(64, 65536, 233472, 232448, 32),
    "sm_100": Machine(64, 65536, 233472, 232448, 32),
    "sm_120": Machine(48, 65536, 102400, 101376, 24),
    "gfx942": Machine(32, 512, 65536, 65536, 32),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code, in figures.

    Attributes:
        kernel: Its name.
        constants: Its compile-time constants that are numbers, by name.
        warps: Per program.
        registers: Per thread.
        spills: Instructions, or on AMD registers, that go to memory for want of registers.
        loop_spills: Those of them in innermost loops (on AMD instructions, too).
        shared_bytes: Per program.
        tensor_bytes: Columns of tensor memory (Blackwell).
        matrix: Matrix instructions in the hot loop, by name.
        pipelined: Whether the hot loop starts loads that a later turn waits for (on AMD: loads).
        instructions: In all.
        loop: Instructions of the hot loop: the innermost one with most matrix instructions.
        longest: The same of the longest innermost loop with any.
        programs: Resident per multiprocessor; 0: cannot be launched.
        limit: What bounds them.
    """

    kernel: str
    constants: Mapping[str, int]
    warps: int
    registers: int
    spills: int
    loop_spills: int
    shared_bytes: int
    tensor_bytes: int
    matrix: Mapping[str, int]
    pipelined: bool
    instructions: int
    loop: int
    longest: int
    programs: int
    limit: str


@dataclass(frozen=True)
class Planned:
    """A launch that was asked for and not done."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, architecture: str) -> Specialization:
        """What would be compiled there."""
        return specialize(self.kernel, TARGETS[architecture], self.args, self.kwargs)


@contextmanager
def recorded() -> Iterator[list[Planned]]:
    """Within it launches are noted down and not done: outputs hold what they hold."""
    launches: list[Planned] = []
    before = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kw: Any) -> None:
        launches.append(Planned(kernel, args, kw))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = before


def compiled(call: Specialization, architecture: str) -> Compiled:
    """Compiles, or finds in the caches of Triton and of this."""
    asked = ("num_warps", "num_stages", "maxnreg")
    wanted = {name: getattr(call.options, name) for name in asked if hasattr(call.options, name)}
    kernel = triton.compile(call.source(), target=TARGETS[architecture], options=wanted)
    key = kernel.hash + hashlib.sha256(_VERSION).hexdigest()[:8]
    row = cache_directory().parent / "triton-static" / f"{key}.json"
    if row.exists():
        return Compiled(**json.loads(row.read_text()))
    figures = _figures(call, kernel, architecture)
    row.parent.mkdir(exist_ok=True)
    row.write_text(json.dumps(asdict(figures)))
    return figures


_VERSION = b"8"
"""Change it with what is measured: older rows are not looked at any more."""


def _figures(call: Specialization, kernel: Any, architecture: str) -> Compiled:
    names = list(call.signature)
    constants = {names[place[0]]: value for place, value in call.constants.items()}
    made = kernel.metadata
    tensor = getattr(made, "tmem_size", 0) or 0
    if architecture.startswith("gfx"):
        code = machine_code.amd(kernel.asm["amdgcn"])
    else:
        code = machine_code.nvidia(kernel.asm["cubin"])
    programs, limit = _resident(
        MACHINES[architecture], code.registers, made.num_warps, made.shared, tensor, architecture
    )
    return Compiled(
        call.kernel.fn.__name__,
        {k: v for k, v in constants.items() if isinstance(v, int) and not isinstance(v, bool)},
        made.num_warps,
        code.registers,
        code.spills,
        code.loop_spills,
        made.shared,
        tensor,
        code.matrix,
        code.pipelined,
        code.instructions,
        code.loop,
        code.longest,
        programs,
        limit,
    )


def _resident(
    machine: Machine, registers: int, warps: int, shared: int, tensor: int, architecture: str
) -> tuple[int, str]:
    """Programs a multiprocessor holds, and what bounds that."""
    bounds = {"warps": machine.warps // warps, "programs": machine.programs}
    if architecture.startswith("gfx"):  # four SIMDs, each with its own registers
        waves = machine.registers // max(8, -(-registers // 8) * 8)
        bounds["registers"] = min(8, waves) * 4 // warps
    else:
        of_warp = -(-registers * 32 // 256) * 256
        bounds["registers"] = machine.registers // 4 // of_warp * 4 // warps
        shared = shared + 1024 if shared <= machine.program_shared_bytes else 1 << 30
    if shared:
        bounds["shared memory"] = machine.shared_bytes // shared
    if tensor:
        bounds["tensor memory"] = 512 // tensor
    fewest = min(bounds.values())
    return fewest, ", ".join(name for name, count in bounds.items() if count == fewest)
