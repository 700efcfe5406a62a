"""One step of decoding as `bench` times it: what is kept beside the cache is prepared before."""

from __future__ import annotations

from collections.abc import Callable

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.methods import Method


def decode_step(method: Method, call: AttentionCall) -> Callable[[], AttentionResult]:
    """A function that answers ``call``, the newest query rows against a full KV cache.

    Nothing is kept beside the cache yet: the whole call is answered anew, as correct as it is slow.
    """
    return lambda: method(call)
