"""Launches of Triton kernels, run on the CPU: front end -> TTIR -> C -> gcc -> threads."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from triton_cpu.emit import Emitter
from triton_cpu.ops import emit_op
from triton_cpu.specialize import AMPERE, Specialization, specialize
from triton_cpu.ttir import parse

# -O2 runs 1.5 times as fast and compiles twice as long; most kernels run briefly.
_FLAGS = ["-O1", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fopenmp"]
_FLAGS += ["-fwrapv", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
_FLAGS += ["-shared", "-fPIC", "-w"]
_MAX_ARGS = 96


class OutOfBounds(IndexError):
    """A kernel read or wrote outside its arguments."""


class _Counts(ctypes.Structure):
    _fields_ = (
        ("loaded", ctypes.c_uint64 * _MAX_ARGS),
        ("stored", ctypes.c_uint64 * _MAX_ARGS),
        ("outside", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Launch:
    """What one launch did.

    Attributes:
        name: Of the kernel.
        grid: Programs in each direction.
        values: Its arguments by name.
        loaded_bytes: What its programs asked for, by argument; what two of them ask for, twice.
        stored_bytes: The same of stores.
    """

    name: str
    grid: tuple[int, int, int]
    values: dict[str, Any]
    loaded_bytes: dict[str, int]
    stored_bytes: dict[str, int]


class Executor:
    """Within it, launches of Triton kernels on CPU tensors run here; every access is checked.

    ``with Executor() as executor: kernel[grid](*tensors, BLOCK=64)``, and then
    ``executor.launches`` says what was done. Differs from a GPU in this: programs don't share
    a cache, ``tl.dot`` sums in order, lanes that are masked off with no ``other`` get NaN.

    Args:
        tf32: Round the operands of float32 products as tensor cores do, where a kernel allows it,
            or split them for ``tf32x3``.
        ones: Compile anew for numbers that are 1, as a GPU's launcher does; without, calls of many
            shapes share a kernel.
        distinct: Count what neighbouring lanes of a tile share once, as memory would.
        backwards: Begin with the last program of a grid; on a GPU any may come first.
    """

    def __init__(
        self,
        tf32: bool = False,
        ones: bool = True,
        distinct: bool = False,
        backwards: bool = False,
    ) -> None:
        self.launches: list[Launch] = []
        self._modes, self._ones, self._backwards = (tf32, distinct), ones, backwards

    def __enter__(self) -> Executor:
        self._before = JITFunction.run

        def run(
            kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
        ) -> None:
            self._run(kernel, grid, args, kwargs)

        JITFunction.run = run
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        JITFunction.run = self._before

    def _run(self, kernel: JITFunction, grid: Any, args: Any, kwargs: dict[str, Any]) -> None:
        call = specialize(kernel, AMPERE, args, kwargs, self._ones)
        grid = grid(call.values) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        names = [name for name, kind in call.signature.items() if kind != "constexpr"]
        tensors = [name for name in names if isinstance(call.values[name], torch.Tensor)]
        words = (ctypes.c_uint64 * max(1, len(names)))()
        for place, name in enumerate(names):
            words[place] = _word(call.values[name], call.signature[name])
        ranges = (ctypes.c_uint64 * max(1, 2 * len(tensors)))()
        for place, name in enumerate(tensors):
            ranges[2 * place], ranges[2 * place + 1] = _extent(call.values[name])
        counts = _Counts()
        size = len(tensors)
        _compiled(call, *self._modes)(
            words, ranges, size, *grid, self._backwards, ctypes.byref(counts)
        )
        if counts.outside:
            raise OutOfBounds(
                f"{kernel.fn.__name__}: {counts.outside} accesses in tiles that leave their "
                f"arguments, one at {counts.address:#x}"
            )
        loaded, stored = (
            dict(zip(tensors, x, strict=False)) for x in (counts.loaded, counts.stored)
        )
        self.launches.append(Launch(kernel.fn.__name__, grid, dict(call.values), loaded, stored))


def ttir(call: Specialization) -> str:
    """The kernel as the compilers of GPUs get it, without locations."""
    backend = make_backend(AMPERE)  # before Hopper: descriptors are rewritten to pointers
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(call.options), backend.get_module_map()
    module = call.source().make_ir(AMPERE, call.options, *helpers, context)
    return str(backend.make_ttir(module, {}, call.options, AMPERE.arch).str_nodebug())


@functools.cache
def _version() -> bytes:
    """Differs with this package and the compiler."""
    files = sorted(Path(__file__).parent.glob("*.[ph]*"))
    gcc = subprocess.run(["gcc", "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0]
    parts = [*(path.read_bytes() for path in files), gcc, cpu.encode()]
    return b"\0".join([*parts, triton.__version__.encode(), *map(str.encode, _FLAGS)])


_libraries: dict[str, Callable[..., None]] = {}


def _compiled(call: Specialization, tf32: bool, distinct: bool) -> Callable[..., None]:
    """``launch`` of the kernel, from the cache if possible."""
    types = sorted(call.signature.items())
    key = (call.kernel.cache_key, types, repr(call.constants), tf32, distinct)
    digest = hashlib.sha256(_version() + repr(key).encode()).hexdigest()[:24]
    if digest not in _libraries:
        library = cache_directory() / f"{call.kernel.fn.__name__}-{digest}.so"
        if not library.exists():
            source = Emitter(parse(ttir(call)), emit_op, tf32, distinct).source()
            library.with_suffix(".c").write_text(source)
            with tempfile.NamedTemporaryFile(dir=library.parent, delete=False) as made:
                pass
            command = ["gcc", *_FLAGS, str(library.with_suffix(".c")), "-o", made.name, "-lm"]
            subprocess.run(command, check=True)
            Path(made.name).replace(library)
        _libraries[digest] = ctypes.CDLL(str(library)).launch
        _libraries[digest].restype = None
    return _libraries[digest]


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "mra-cli" / "triton-cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _word(value: Any, kind: str) -> int:
    """An argument in the first bytes of 64 bits."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind in ("fp32", "fp64"):
        number = ctypes.c_float(value) if kind == "fp32" else ctypes.c_double(value)
        return int.from_bytes(bytes(number), "little")
    return int(value) & (2**64 - 1)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    if tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return start, start + (last + 1) * tensor.element_size()
