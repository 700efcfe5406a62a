"""Positive random features: exp(q . k) as a product of features of q and features of k."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mra_cli.methods.rows import Keep, SoftmaxRows, groups

BLOCK = 64
"""Rows and keys per block where what a row may see differs between rows."""


def orthogonal_features(count: int, width: int, seed: int) -> Tensor:
    """Directions ``[count, width]``, orthogonal in runs of ``width``, of the norms of normal ones
    (Choromanski et al., ICLR 2021, arXiv 2009.14794)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(-(-count // width), width, width, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(normal).Q.transpose(1, 2).flatten(0, 1)[:count]
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

    def add_to(self, rows: SoftmaxRows, reach: int = 0, near: Keep | None = None) -> None:
        """Add the approximated scores of all visible pairs but those that are ``near``.

        Args:
            reach: How far apart in positions near pairs can be.
        """
        value = torch.nn.functional.pad(rows.value, (0, 1), value=1.0)  # the last one counts
        if near is None and not rows.mask.is_causal:
            every = groups(rows.mask.n_queries, rows.mask.n_queries, value.device)
            state = self.key.transpose(2, 3) @ value
            sums = (self.query @ state)[:, :, None]
            self._product(rows, self.key.shape[2] + self.query.shape[2], value.shape[3])
        else:
            every = groups(rows.mask.n_queries, BLOCK, value.device)
            sums = self._far(rows, value, reach) + self._within(rows, value, reach, near)
        peak = torch.nn.functional.pad(self.peak, (0, every.numel() - self.peak.shape[2]))
        peak = peak.unflatten(2, every.shape[2:])
        rows.add_part(every, peak, sums[..., -1], sums[..., :-1])

    def _far(self, rows: SoftmaxRows, value: Tensor, reach: int) -> Tensor:
        """Sums over all keys of blocks out of reach, ``[B, H, G, BLOCK, Dv + 1]``."""
        key, held = (_blocks(x) for x in (self.key, value))
        sums = key.transpose(3, 4) @ held  # of each block
        across = -(-reach // BLOCK)
        empty = sums.new_zeros(*sums.shape[:2], across + 1, *sums.shape[3:])
        state = torch.cat([empty, sums.cumsum(2)], 2)[:, :, : sums.shape[2]]
        if not rows.mask.is_causal:
            after = torch.cat([empty, sums.flip(2).cumsum(2)], 2)[:, :, : sums.shape[2]]
            state = state + after.flip(2)
        self._product(rows, self.key.shape[2] + self.query.shape[2], value.shape[3])
        return _blocks(self.query) @ state

    def _within(self, rows: SoftmaxRows, value: Tensor, reach: int, near: Keep | None) -> Tensor:
        """Sums over the keys of blocks in reach, pair by pair, as `_far`."""
        every = groups(rows.mask.n_queries, BLOCK, value.device)
        before = -(-reach // BLOCK)
        after = 0 if rows.mask.is_causal else before
        first = torch.arange(every.shape[2], device=every.device) - before
        keys = first[:, None] * BLOCK + torch.arange((before + after + 1) * BLOCK).to(every)
        keys = keys.masked_fill((keys < 0) | (keys >= rows.mask.n_keys), -1)[None, None]
        far = None if near is None else lambda row, key: ~near(row, key)
        parts = []
        for block in range(every.shape[2]):
            own, whose = every[:, :, block : block + 1], keys[:, :, block : block + 1]
            there, named = own[0, 0, 0].clamp(min=0), whose[0, 0, 0].clamp(min=0)
            products = self.query[:, :, there] @ self.key[:, :, named].transpose(2, 3)
            seen = rows.seen(own, whose, far)
            if seen is not None:
                products = products * seen[:, :, 0]
            parts.append(products @ value[:, :, named])
            self._product(
                rows,
                products.shape[2] * products.shape[3] / self.query.shape[3],
                self.query.shape[3] + value.shape[3],
            )
        return torch.stack(parts, 2)

    def _product(self, rows: SoftmaxRows, tokens: float, width: int) -> None:
        batch, heads, _, count = self.query.shape
        rows.tally.products += round(batch * heads * tokens * count * width)


def _blocks(tokens: Tensor) -> Tensor:
    """``[B, H, L, D]`` in blocks, ``[B, H, G, BLOCK, D]``, with zeros after the last."""
    more = -tokens.shape[2] % BLOCK
    return torch.nn.functional.pad(tokens, (0, 0, 0, more)).unflatten(2, (-1, BLOCK))
