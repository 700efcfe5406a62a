"""Positive random features: exp(q . k) as a product of features of q and features of k."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.rows import Keep, SoftmaxRows, groups

BLOCK = 64
"""Rows that share their sums over keys where what a row may see differs between rows."""


def orthogonal_features(count: int, width: int, seed: int) -> Tensor:
    """Directions ``[count, width]``, orthogonal in runs of ``width``, of the norms of normal ones
    (Choromanski et al., ICLR 2021, arXiv 2009.14794)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(-(-count // width), width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # else some directions never come up
    directions = q.transpose(1, 2).flatten(0, 1)[:count]
    norms = torch.randn(count, width, generator=generator, dtype=torch.float64).norm(dim=1)
    return directions * norms[:, None]


@dataclass(frozen=True, eq=False)
class Features:
    """``exp(scaling q . k)`` is ``exp(peak) * query . key`` on average.

    Attributes:
        query: ``[B, H, N, m]``, at most 1.
        key: ``[B, H, M, m]``, at most 1; zero for padding.
        peak: ``[B, H, N]``.
    """

    query: Tensor
    key: Tensor
    peak: Tensor

    @classmethod
    def of(cls, rows: SoftmaxRows, directions: Tensor) -> Features:
        """Features of the queries and keys of a call in these directions ``[m, D]``."""
        logs = []
        for tokens in (rows.query, rows.key):
            x = tokens * math.sqrt(rows.rule.scaling)
            logs.append(x @ directions.to(x).T - x.square().sum(-1, keepdim=True) / 2)
            rows.tally.products += x.numel() * len(directions)
        log_q, log_k = logs
        valid = rows.mask.key_valid
        if valid is not None:
            log_k = log_k.masked_fill(~valid[:, None, :, None], -torch.inf)
        peak_q, peak_k = log_q.detach().amax(-1), log_k.detach().amax((2, 3))
        peak = peak_q + peak_k[..., None] - math.log(len(directions))
        query, key = log_q - peak_q[..., None], log_k - peak_k[..., None, None]
        return cls(query.exp(), key.exp(), peak)

    def add_to(
        self, rows: SoftmaxRows, block: int = BLOCK, reach: int = 0, near: Keep | None = None
    ) -> None:
        """Add the approximated scores of all visible pairs but those that are ``near``.

        Args:
            block: Rows that share their sums over keys, where rows see different keys.
            reach: How far apart in positions near pairs can be.
        """
        value = torch.nn.functional.pad(rows.value, (0, 1), value=1.0)  # the last one counts
        if near is None and not rows.mask.is_causal:
            every = groups(rows.mask.n_queries, rows.mask.n_queries, value.device)
            self._tell(rows, self.key.shape[2] + self.query.shape[2], value.shape[3])
            sums = (self.query @ (self.key.transpose(2, 3) @ value))[:, :, None]
        else:
            every = groups(rows.mask.n_queries, block, value.device)
            across = -(-reach // block)
            sums = self._within(rows, value, every, across, near) + self._before(
                rows, value, block, across, forwards=True
            )
            if not rows.mask.is_causal:
                sums = sums + self._before(rows, value, block, across, forwards=False)
        peak = torch.nn.functional.pad(self.peak, (0, every.numel() - self.peak.shape[2]))
        rows.add_part(every, peak.unflatten(2, every.shape[2:]), sums[..., -1], sums[..., :-1])

    def _before(
        self, rows: SoftmaxRows, value: Tensor, block: int, across: int, *, forwards: bool
    ) -> Tensor:
        """Sums over the keys of all blocks more than ``across`` before each block (or after it),
        ``[B, H, G, block, Dv + 1]``; one block after the other, for little memory."""
        query, key, held = (_in_blocks(x, block) for x in (self.query, self.key, value))
        count = query.shape[2]
        state = value.new_zeros(*value.shape[:2], key.shape[4], value.shape[3])
        parts = [value.new_zeros(0)] * count
        for number in range(count) if forwards else range(count - 1, -1, -1):
            left = number - across - 1 if forwards else number + across + 1
            if 0 <= left < count:
                state = state + key[:, :, left].transpose(2, 3) @ held[:, :, left]
            parts[number] = query[:, :, number] @ state
        self._tell(rows, self.key.shape[2] + self.query.shape[2], value.shape[3])
        return torch.stack(parts, 2)

    def _within(
        self, rows: SoftmaxRows, value: Tensor, every: Tensor, across: int, near: Keep | None
    ) -> Tensor:
        """Sums over the keys of blocks at most ``across`` apart, pair by pair, as `_before`."""
        block = every.shape[3]
        after = 0 if rows.mask.is_causal else across
        first = torch.arange(every.shape[2], device=every.device) - across
        keys = first[:, None] * block + torch.arange((across + after + 1) * block).to(every)
        keys = keys.masked_fill((keys < 0) | (keys >= rows.mask.n_keys), -1)[None, None]
        far = None if near is None else lambda row, key: ~near(row, key)
        parts = []
        for number in range(every.shape[2]):
            own, whose = every[:, :, number : number + 1], keys[:, :, number : number + 1]
            there, named = own[0, 0, 0].clamp(min=0), whose[0, 0, 0].clamp(min=0)
            products = self.query[:, :, there] @ self.key[:, :, named].transpose(2, 3)
            seen = rows.seen(own, whose, far)
            if seen is not None:
                products = products * seen[:, :, 0]
            parts.append(products @ value[:, :, named])
            width = self.query.shape[3] + value.shape[3]
            rows.tally.products += products.numel() * width
        return torch.stack(parts, 2)

    def _tell(self, rows: SoftmaxRows, tokens: int, width: int) -> None:
        batch, heads, _, count = self.query.shape
        rows.tally.products += batch * heads * tokens * count * width


def _in_blocks(tokens: Tensor, block: int) -> Tensor:
    """``[B, H, L, D]`` in blocks, ``[B, H, G, block, D]``, with zeros after the last."""
    more = -tokens.shape[2] % block
    return torch.nn.functional.pad(tokens, (0, 0, 0, more)).unflatten(2, (-1, block))


def feature_products(call: AttentionCall, count: int, block: int, reach: int | None) -> int:
    """Multiply-adds of ``count`` features in a call.

    Args:
        block, reach: As in `Features.add_to`; ``reach`` None: no pairs are left out.
    """
    (batch, heads, n, width), m, value = call.query.shape, call.n_keys, call.value.shape[3] + 1
    made = (n + m) * count * width
    if reach is None and not (call.mask is not None and call.mask.is_causal):
        return batch * heads * (made + (n + m) * count * value)
    sides = 1 if call.mask is not None and call.mask.is_causal else 2
    keys = (sides * -(-(reach or 0) // block) + 1) * block
    return batch * heads * (made + sides * (n + m) * count * value + n * keys * (count + value))
