"""Blocks of tokens: masked means at every resolution, and tokens block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def block_pyramid(
    tokens: Tensor, valid: Tensor | None, sides: tuple[int, ...]
) -> dict[int, Tensor]:
    """Means over the real tokens of each block, built recursively from fine to coarse.

    ``mean(q . k) == mean(q) . mean(k)`` over a block pair, so pooled scores are exact block means
    of the logits (arXiv 2207.10284, section 3).

    Args:
        tokens: ``[G, H, n, d]``, n a multiple of every side.
        valid: False for padding, bool ``[G or 1, n]``; None: all real.
        sides: Block sides from coarse to fine; a side of 1 is skipped.

    Returns:
        For each side above 1 the means ``[G, H, n / side, d]``; 0 for blocks without a real token.
    """
    sums = tokens if valid is None else tokens * valid[:, None, :, None]
    counts = None if valid is None else valid.to(tokens.dtype)
    pyramid: dict[int, Tensor] = {}
    done = 1
    for side in sorted(side for side in sides if side > 1):
        sums = sums.unflatten(2, (-1, side // done)).sum(3)
        if counts is None:
            pyramid[side] = sums / side
        else:
            counts = counts.unflatten(1, (-1, side // done)).sum(2)
            pyramid[side] = sums / counts.clamp(min=1)[:, None, :, None]
        done = side
    return pyramid


def pad_blocks(tokens: Tensor, side: int) -> Tensor:
    """Zeros appended along dimension 2 until its length is a multiple of ``side``."""
    missing = -tokens.shape[2] % side
    return torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def take_blocks(source: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """``source[outer, inner]``, several times faster: whole blocks are copied at once."""
    outer, inner = torch.broadcast_tensors(outer, inner)
    picked = source.flatten(0, 1).index_select(0, (outer * source.shape[1] + inner).flatten())
    return picked.unflatten(0, inner.shape)


def tiled_rows(tensor: Tensor, rows: int, fill: float) -> Tensor:
    """``[..., n, m]`` cut into blocks of ``rows``: ``[..., blocks, rows, m]``."""
    missing = -tensor.shape[-2] % rows
    if torch.compiler.is_compiling() or missing:  # one graph for both
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing), value=fill)
    return tensor.unflatten(-2, (-1, rows))


def each_row(blocks: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """What is said of blocks of ``rows`` tokens, ``[B, H, blocks, ...]``, for each of the tokens
    ``[B, H, N, ...]``."""
    if torch.compiler.is_compiling():  # one graph, whether or not the last block is whole
        block = torch.arange(tokens.shape[2], device=tokens.device) // rows
        return blocks.index_select(2, block)
    return blocks.repeat_interleave(rows, 2)[:, :, : tokens.shape[2]]


def counted_means(tokens: Tensor, counted: Tensor, rows: int) -> Tensor:
    """Mean of the counted tokens of each block, ``[B, H, blocks, D]``."""
    weights = tiled_rows(counted[:, None, :, None].to(tokens.dtype), rows, 0.0)
    sums = (tiled_rows(tokens, rows, 0.0) * weights).sum(3)
    return sums / weights.sum(3).clamp(min=1)
