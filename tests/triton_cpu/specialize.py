"""What Triton makes of a launch: the types, constants and attributes that a kernel is compiled for.

The binder is Triton's own, so that a kernel is specialised as on a GPU; no driver is needed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Triton 3.10 turns off by default what every kernel has had so far.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

AMPERE = GPUTarget("cuda", 80, 32)


@dataclass(frozen=True)
class Specialization:
    """One kernel as compiled for one launch.

    Attributes:
        kernel: The function.
        values: Arguments by name, defaults among them.
        signature: Types by name; ``constexpr`` for constants.
        constants: By place.
        attributes: What is known of arguments (divisibility), by place.
        options: ``num_warps``, ``num_stages`` and their like.
    """

    kernel: JITFunction
    values: Mapping[str, Any]
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Any

    def source(self) -> ASTSource:
        """For `triton.compile`."""
        return ASTSource(self.kernel, dict(self.signature), self.constants, self.attributes)


@functools.cache
def _binder(kernel: JITFunction, target: GPUTarget) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))


def specialize(
    kernel: JITFunction,
    target: GPUTarget,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ones: bool = True,
) -> Specialization:
    """As ``kernel[grid](*args, **kwargs)`` would on a GPU of this kind; without ``ones``, numbers
    that happen to be 1 are no constants."""
    values, specialization, options = _binder(kernel, target)(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        make_backend(target), kwargs, values, specialization, options
    )
    for place, parameter in enumerate(kernel.params):
        number = not parameter.is_constexpr and type(values[parameter.name]) is int
        if number and not ones and (place,) in constants:
            del constants[place,]
            signature[parameter.name] = "i32"
    return Specialization(kernel, values, signature, constants, attributes, options)
