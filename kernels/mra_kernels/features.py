"""A few features of queries and keys, in bytes, whose products estimate their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mra_kernels.config import MraKeysConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.pyramid import counted_means, each_row, tiled_rows

QUERY_LEVELS, KEY_LEVELS = 127, 63
"""Features are whole numbers from minus to plus so many, so that processors multiply four of them
at a time: products of two fit 16 bits in pairs."""

_MOST_MEANS = 16
"""Features of keys are cut off at so many times their mean size, or a single key that is far out
would leave the others no levels; few of pretrained models are."""

_LEAST_UNIT = 1e-4
"""Nats that products of features count in, at least."""

_TOKENS_FOR_FEATURES = 1024
"""The leading features are those of so many tokens, spread evenly over the sequence."""

_TURNS = 12
"""Turns of the orthogonal iteration."""

_FEWER = 8
"""Every so many-th of them is enough for their mean size."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Features of queries and keys whose products are nearest to ``query . key``.

    Attributes:
        to_query, to_key: Times a token they are its features, ``[B, H, D, rank]``.
        mean: Of all keys, ``[B, Hkv, 1, D]``.
        most: Where features of keys are cut off, ``[B, H]``.
    """

    to_query: Tensor
    to_key: Tensor
    mean: Tensor
    most: Tensor

    @classmethod
    def leading(cls, query: Tensor, key: Tensor, mask: AttentionMask, rank: int) -> Directions:
        """The best approximation of that rank in the mean square over all pairs (Eckart & Young,
        1936), by whitening with the second moment of the queries; with the rank of the head, all.

        Keys count relative to their mean, which shifts all scores of a query alike. Features of
        queries and keys are as large, so that they suffer as little where they are rounded.

        Args:
            query: ``[B, H, N, D]``.
            key: ``[B, Hkv, M, D]``.
        """
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
        valid = mask.key_valid
        if valid is None:
            valid = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
        mean = counted_means(key, valid, key.shape[2])
        some_keys = _some(key - mean, valid)
        of_queries = _second_moment(_some(query, mask.query_valid))
        of_keys = _second_moment(some_keys).repeat_interleave(heads // kv_heads, 1)
        identity = torch.eye(width, dtype=query.dtype, device=query.device).expand_as(of_queries)
        to_query = to_key = identity
        if rank < width:
            size = of_queries.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-20)
            lower = torch.linalg.cholesky_ex(of_queries / size + 1e-5 * identity)[0]
            vectors = leading_vectors(lower.mT @ of_keys @ lower, rank)
            to_query = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
            to_key = lower @ vectors
        size_q, size_k = (
            (to.mT @ moment @ to).diagonal(dim1=-2, dim2=-1)[..., None, :].clamp(min=1e-20)
            for to, moment in ((to_query, of_queries), (to_key, of_keys))
        )
        balance = (size_k / size_q) ** 0.25
        to_query, to_key = to_query * balance, to_key / balance
        few = some_keys[:, :, None, ::_FEWER]
        sizes = (few @ to_key.unflatten(1, (kv_heads, -1))).flatten(1, 2).abs()
        real = (few != 0).any(-1).sum(3).repeat_interleave(heads // kv_heads, 1)[..., 0]
        usual = sizes.sum((2, 3)) / (real * to_key.shape[-1]).clamp(min=1)
        return cls(to_query, to_key, mean, _MOST_MEANS * usual)

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries, ``[B, H, N, rank]``, and keys, ``[B, H, M, rank]``."""
        kv_heads = key.shape[1]
        grouped = (key - self.mean)[:, :, None] @ self.to_key.unflatten(1, (kv_heads, -1))
        return query @ self.to_query, grouped.flatten(1, 2)


@dataclass(frozen=True, eq=False)
class ByteFeatures:
    """Leading features in bytes; products of a query's and a key's estimate their logit.

    Attributes:
        query, key: Whole numbers, ``[B, H, N, rank]`` and ``[B, H, M, rank]``.
        unit: Nats that a product of each block's queries counts, ``[B, H, blocks]``.
    """

    query: Tensor
    key: Tensor
    unit: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        config: MraKeysConfig,
        scaling: float,
    ) -> ByteFeatures:
        """Features of queries ``[B, H, N, D]`` and keys ``[B, Hkv, M, D]``; padding has none."""
        directions = Directions.leading(query, key, mask, config.rank)
        q, k = directions.features(query, key)
        counted, _ = mask.pooled_tokens(config.rows)
        q, k = (
            x if valid is None else x * valid[:, None, :, None]
            for x, valid in ((q * scaling, counted), (k, mask.key_valid))
        )
        most_k = torch.minimum(k.abs().amax((2, 3)), directions.most)
        step_k = most_k.clamp(min=1e-20) / KEY_LEVELS
        most_q = tiled_rows(q, config.rows, 0.0).abs().amax((3, 4))
        unit = (most_q * step_k[..., None] / QUERY_LEVELS).clamp(min=_LEAST_UNIT)
        step_q = each_row((unit / step_k[..., None])[..., None], q, config.rows)
        levels = (k / step_k[..., None, None]).round().clamp(-KEY_LEVELS, KEY_LEVELS)
        return cls((q / step_q).round(), levels, unit)


def leading_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal vectors that span those of the largest eigenvalues, ``[..., D, rank]``: on CPUs
    the eigenvectors.

    GPUs work out eigenvectors one matrix after another while the host waits, so there it is
    orthogonal iteration, all matrices at a time (Golub & Van Loan, "Matrix Computations", 8.2).
    """
    if matrix.device.type == "cpu":
        return torch.linalg.eigh(matrix)[1][..., -rank:]
    return iterated_vectors(matrix, rank)


def iterated_vectors(matrix: Tensor, rank: int) -> Tensor:
    """`leading_vectors` of positive semi-definite matrices ``[..., D, D]`` by orthogonal iteration;
    eigenvalues below a ten-millionth of the trace count as none."""
    width = matrix.shape[-1]
    size = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-20)
    scaled = matrix.double() / size
    place = torch.arange(width, dtype=torch.float64, device=matrix.device)
    # Where it starts from matters little, as long as it has no pattern.
    vectors = torch.sin((12.9898 * place[:, None] + 78.233 * place[:rank] + 1) * 43758.5453)
    least = 1e-14 * torch.eye(rank, dtype=torch.float64, device=matrix.device)
    for _ in range(_TURNS):
        moved = scaled @ vectors
        lower = torch.linalg.cholesky_ex(moved.mT @ moved + least)[0]
        vectors = torch.linalg.solve_triangular(lower, moved.mT, upper=False).mT
    return vectors.to(matrix.dtype)


def _some(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Tokens spread evenly over long sequences, padding zeroed, ``[B, H, n, D]``."""
    step = -(-tokens.shape[2] // _TOKENS_FOR_FEATURES)
    some = tokens[:, :, ::step]
    return some if valid is None else some * valid[:, None, ::step, None]


def _second_moment(tokens: Tensor) -> Tensor:
    """Mean outer product, ``[B, H, D, D]``."""
    return tokens.mT @ tokens / tokens.shape[2]
