"""Stands in for the kernels, `mra_kernels.native` and `_triton`, in patched checkpoints."""

from __future__ import annotations

from typing import Any


class native:  # the name of the module that is left out
    """Can't take anything."""

    @staticmethod
    def reason_against(*tensors: Any, mask: Any = None) -> str:
        """Why not, in one line."""
        return "native is part of the package mra-cli, not of a checkpoint; install it"


class _triton:  # another
    """Can't take anything either."""

    @staticmethod
    def reason_against(*tensors: Any, **call: Any) -> str:
        """Why not, in one line."""
        return "triton is part of the package mra-cli, not of a checkpoint; install it"

    reason_here = reason_against

    @staticmethod
    def runs_on_cpu() -> bool:
        """It doesn't."""
        return False
