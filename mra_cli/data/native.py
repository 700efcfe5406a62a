"""Stands in for `mra_kernels.native` in patched checkpoints, which carry no C++."""

from __future__ import annotations

from typing import Any


class native:  # the name of the module that is left out
    """Can't take anything."""

    @staticmethod
    def reason_against(*tensors: Any, mask: Any = None) -> str:
        """Why not, in one line."""
        return "native is part of the package mra-cli, not of a checkpoint; install it"
