"""How a dot product of a query and a key becomes an attention logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mra_kernels.masks import AttentionMask


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """``logit = softcap * tanh(scaling * q.k / softcap) + bias``.

    Attributes:
        scaling: Factor on the dot product.
        softcap: Soft-cap of the logits (Gemma 2), None for none.
        bias: Additive bias, ``[B or 1, H or 1, N, M]`` (T5, BEiT), None for none.
    """

    scaling: float
    softcap: float | None = None
    bias: Tensor | None = None

    def logits(self, dots: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of dot products; ``bias`` is the part of the bias that belongs to them."""
        logits = dots * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if bias is None else logits + bias

    def block_bias(
        self, mask: AttentionMask, side: int, query_rows: int | None = None
    ) -> Tensor | None:
        """Mean of the bias over the real keys of each block of ``side`` and, unless ``query_rows``
        is None, over the queries of each block of so many:
        ``[B or 1, H or 1, N or blocks, key blocks]``.
        """
        if self.bias is None:
            return None
        bias = block_mean(self.bias, mask.key_valid, side)
        if query_rows is None:
            return bias
        return block_mean(bias.transpose(2, 3), None, query_rows).transpose(2, 3)


def block_mean(values: Tensor, valid: Tensor | None, side: int) -> Tensor:
    """Means over blocks of the last dimension, real entries only."""
    length = values.shape[-1]
    if valid is None:
        valid = torch.ones(1, length, dtype=torch.bool, device=values.device)
    weights = valid[:, None, None].to(values.dtype)
    pad = (0, -length % side)
    sums = torch.nn.functional.pad(values * weights, pad).unflatten(-1, (-1, side)).sum(-1)
    counts = torch.nn.functional.pad(weights, pad).unflatten(-1, (-1, side)).sum(-1)
    return sums / counts.clamp(min=1)


def gather_bias(bias: Tensor | None, batch: Tensor, head: Tensor, *where: Tensor) -> Tensor | None:
    """``bias[batch, head, *where]``, with the first two dimensions broadcast where they are 1."""
    if bias is None:
        return None
    batch = batch if bias.shape[0] > 1 else torch.zeros_like(batch)
    head = head if bias.shape[1] > 1 else torch.zeros_like(head)
    return bias[(batch, head, *where)]
