"""Runs Triton kernels on the CPU at compiled speed, as their compilers see them.

`Executor` takes the IR that Triton's own front end makes (types, wrap-around, folded constants,
masks), which the interpreter of Triton never sees, checks every access and counts bytes.
"""

from triton_cpu.run import Executor, Launch, OutOfBounds
from triton_cpu.specialize import Specialization, specialize

__all__ = ["Executor", "Launch", "OutOfBounds", "Specialization", "specialize"]
