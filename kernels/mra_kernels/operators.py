"""Registers the operators of the Triton kernels with torch: a process that imports nothing else of
this package imports it before `torch.export.load`. Needs triton."""

from mra_kernels._triton import autograd, keys

__all__ = ["autograd", "keys"]
