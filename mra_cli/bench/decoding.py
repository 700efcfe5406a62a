"""One step of decoding as `bench` times it: block means are kept beside the cache, as in a patched
model, and every step takes in the newest rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mra_cli.caches import CachedBlocks
from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.methods import Method
from mra_kernels import native


def decode_step(method: Method, call: AttentionCall) -> Callable[[], AttentionResult]:
    """A function that answers ``call``, the newest query rows against a full KV cache.

    The means of older blocks are there when it is called, and those of the newest rows are not.
    Where there can be no such means (cross-attention, no compiled kernels), all is done anew.
    """
    cross = call.mask is None or not (call.mask.query_offset or call.n_queries == call.n_keys)
    tensors = call.query, call.key, call.value, call.sinks, call.bias
    if cross or native.reason_against(*tensors, mask=call.mask) is not None:
        return lambda: method(call)
    blocks = CachedBlocks()
    call = replace(call, blocks=blocks)

    def step() -> AttentionResult:
        blocks.crop(call.n_keys - call.n_queries)
        return method(call)

    return step


def as_decoded(call: AttentionCall) -> AttentionCall:
    """The call as it reaches a method in a patched model, for `Method.reason_for_exact`."""
    return replace(call, blocks=CachedBlocks())
