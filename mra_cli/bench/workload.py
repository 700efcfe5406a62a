"""The attention calls that `bench` times: made up at random, or captured from a real model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mra_cli.analyze import choose_sites
from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint, check_device, read_dtype
from mra_cli.errors import InputError
from mra_cli.inputs import dry_run, make_samples, position_limit
from mra_cli.patching import intercepted
from mra_cli.sites import Site, find_sites
from mra_kernels import AttentionMask

PATTERNS = {
    "NS": "noncausal self-attention",
    "CS": "causal self-attention",
    "NC": "noncausal cross-attention",
    "CC": "causal cross-attention",
}
"""As in the Comprehensive Attention Benchmark (arXiv 2210.07661). CC: the queries come one after
the other (a decoder's) and see the whole memory, so the mask hides nothing, as in NC; but no query
should depend on later ones."""


CPU = torch.device("cpu")


class Workload(Protocol):
    """A source of attention calls.

    Attributes:
        subject: What is timed, in words.
        inputs: Where the numbers come from, in words.
        patterns: Patterns to run.
        dtype, device: Of the tensors.
        random: The numbers have no structure.
    """

    @property
    def subject(self) -> str: ...
    @property
    def inputs(self) -> str: ...
    @property
    def patterns(self) -> tuple[str, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def random(self) -> bool: ...

    def outline(self, pattern: str, length: int) -> AttentionCall:
        """A call of that shape whose numbers mean nothing, for next to no memory.

        Raises:
            InputError: There is no such call.
        """

    def call(self, pattern: str, length: int) -> AttentionCall:
        """The call with ``length`` keys.

        Raises:
            InputError: There is no such call.
        """


@dataclass(frozen=True)
class RandomWorkload:
    """Queries, keys and values of independent normal numbers: any shape, but no structure.

    Cross-attention has half as many queries as keys.
    """

    patterns: tuple[str, ...]
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    seed: int = 0
    random: bool = True

    @classmethod
    def of(
        cls,
        patterns: str,
        *,
        heads: int = 8,
        kv_heads: int = 8,
        head_dim: int = 64,
        batch: int = 1,
        dtype: str = "float32",
        device: str = "cpu",
        seed: int = 0,
    ) -> RandomWorkload:
        """From what was typed: ``NS,CS``, a dtype's name, a device's name.

        Raises:
            InputError: No such pattern, or heads that can't share key heads.
            CheckpointError: No such dtype or device.
        """
        if heads % kv_heads:
            raise InputError(
                f"--kv-heads must divide --heads, got {kv_heads} and {heads}; "
                f"use --kv-heads {heads}, or a divisor"
            )
        check_device(device)
        kinds, kind = parse_patterns(patterns), read_dtype(dtype)
        return cls(kinds, heads, kv_heads, head_dim, batch, kind, torch.device(device), seed)

    @property
    def subject(self) -> str:
        heads = f"{self.heads} heads"
        if self.kv_heads != self.heads:
            heads += f" ({self.kv_heads} for keys)"
        return f"attention, batch {self.batch}, {heads} of {self.head_dim}"

    @property
    def inputs(self) -> str:
        return f"random normal queries, keys and values, seed {self.seed}"

    def outline(self, pattern: str, length: int) -> AttentionCall:
        nothing = torch.zeros(1, dtype=self.dtype, device=self.device)
        return self._made(
            pattern, length, *(nothing.expand(shape) for shape in self._shapes(pattern, length))
        )

    def call(self, pattern: str, length: int) -> AttentionCall:
        generator = torch.Generator().manual_seed(self.seed)
        tensors = (
            torch.randn(shape, generator=generator).to(self.device, self.dtype)
            for shape in self._shapes(pattern, length)
        )
        return self._made(pattern, length, *tensors)

    def _shapes(self, pattern: str, length: int) -> list[tuple[int, ...]]:
        queries = length if pattern[1] == "S" else max(1, length // 2)
        by_heads = [(self.heads, queries), (self.kv_heads, length), (self.kv_heads, length)]
        return [(self.batch, *sizes, self.head_dim) for sizes in by_heads]

    def _made(self, pattern: str, length: int, q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
        if pattern == "CS":
            mask = AttentionMask.causal(length, device=self.device)
        else:
            mask = AttentionMask.full(q.shape[2], length, device=self.device)
        return AttentionCall(q, k, v, mask, self.head_dim**-0.5)


@dataclass(frozen=True, eq=False)
class CapturedWorkload:
    """What really reaches one attention site of a model that reads text."""

    checkpoint: Checkpoint
    site: Site
    seed: int = 0
    random: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, layers: str | None, seed: int = 0) -> CapturedWorkload:
        """At the first site of ``layers`` (see `choose_sites`); None: the one in the middle.

        Raises:
            InputError: The model takes no text, or has no such site.
            UnsupportedModelError: None of its sites can be approximated.
        """
        if checkpoint.model.main_input_name != "input_ids":
            raise InputError(
                f"--inputs must be a model that takes text, so that its length can be varied; "
                f"{checkpoint.name} takes {checkpoint.model.main_input_name}; time it whole: "
                f"mra-cli bench {checkpoint.name}"
            )
        sites = choose_sites(find_sites(checkpoint.model, dry_run(checkpoint)), layers)
        return cls(checkpoint, sites[0 if layers else len(sites) // 2], seed)

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.site.kind,)

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype

    @property
    def device(self) -> torch.device:
        return self.checkpoint.device

    @property
    def subject(self) -> str:
        heads = f"{self.site.heads} heads"
        if self.site.kv_heads != self.site.heads:
            heads += f" ({self.site.kv_heads} for keys)"
        return f"attention of {self.checkpoint.name} at {self.site.name}, {heads} of " + str(
            self.site.head_dim
        )

    @property
    def inputs(self) -> str:
        return f"queries, keys and values of {self.site.name} on Python's help texts"

    def outline(self, pattern: str, length: int) -> AttentionCall:
        limit = position_limit(self.checkpoint)
        if limit is not None and length > limit:
            raise InputError(f"{self.checkpoint.name} has {limit} positions")
        return outline(self.site, length, self.dtype, self.device)

    @torch.no_grad()
    def call(self, pattern: str, length: int) -> AttentionCall:
        samples = make_samples(self.checkpoint, seq_len=length, count=1, seed=self.seed)
        seen: list[AttentionCall] = []

        def keep(site: Site, call: AttentionCall) -> Tensor:
            if not seen:
                tensors = {name: getattr(call, name).clone() for name in ("query", "key", "value")}
                seen.append(replace(call, **tensors))
            return call.exact()

        with intercepted(self.checkpoint.model, {self.site.name: self.site}, keep):
            self.checkpoint.model(**samples.batches[0])
        return seen[0]


def outline(site: Site, length: int, dtype: torch.dtype, device: torch.device) -> AttentionCall:
    """A call in the shape of a site's, with numbers that mean nothing, for next to no memory."""
    shape = RandomWorkload((site.kind,), site.heads, site.kv_heads, site.head_dim, 1, dtype, device)
    return shape.outline(site.kind, length)


def decode_call(call: AttentionCall, rows: int) -> AttentionCall:
    """The last ``rows`` queries of a causal call: what decoding computes with a full cache.

    Raises:
        InputError: The cache would hold fewer tokens than rows.
    """
    if rows >= call.n_keys:
        raise InputError(f"--rows must be less than the cache, got {rows} of {call.n_keys}")
    mask, bias = call.mask, call.bias
    if mask is not None and call.n_queries > rows:
        first = mask.n_queries - rows
        mask = replace(
            mask,
            start=mask.start[:, first:],
            stop=mask.stop[:, first:],
            query_valid=None if mask.query_valid is None else mask.query_valid[:, first:],
            dense=None if mask.dense is None else mask.dense[:, first:],
            query_offset=mask.query_offset + first,
        )
    return replace(
        call,
        query=call.query[:, :, -rows:],
        mask=mask,
        bias=None if bias is None else bias[:, :, -rows:],
    )


def refused_pattern(pattern: str, *, decode: bool) -> str | None:
    """Why a pattern can't run in this mode; None if it can."""
    if decode and pattern[0] == "N":
        return f"{PATTERNS[pattern]} has no decoding: all its queries come at once; use CS or CC"
    return None


def parse_patterns(text: str) -> tuple[str, ...]:
    """``NS,CS`` as a tuple, without repeats.

    Raises:
        InputError: One is no pattern.
    """
    patterns = tuple(dict.fromkeys(part.strip().upper() for part in text.split(",")))
    for pattern in patterns:
        if pattern not in PATTERNS:
            known = ", ".join(f"{name} ({words})" for name, words in PATTERNS.items())
            raise InputError(f"--pattern must be some of {known}; got {pattern!r}")
    return patterns
