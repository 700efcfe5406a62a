"""Nyströmformer: attention through landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice, exact_products, knob_for
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_kernels import AttentionMask


@dataclass(frozen=True)
class Nystrom(Approximation):
    """Softmax between queries and landmarks, landmarks and keys, and the pseudo-inverse of that
    between landmarks (Xiong et al., AAAI 2021, arXiv 2102.03902), without its trained convolution.

    Landmarks are means over segments of the real tokens. The pseudo-inverse is iterated as in the
    paper; it is ill-conditioned, so stopping early helps.

    Attributes:
        landmarks: Segments.
        iterations: Steps towards the pseudo-inverse.
    """

    name: ClassVar[str] = "nystrom"
    about: ClassVar[About] = About(
        summary="attention through segment means as landmarks",
        source="Nyströmformer: Xiong et al., AAAI 2021, arXiv 2102.03902",
        patterns=("NS", "NC"),
        cost="N x landmarks",
        budgets="multiply-adds",
        masks="padding",
        honours=("soft-cap",),
        adapted="no convolution; the pseudo-inverse starts from each matrix's own norms",
    )

    landmarks: int | None = None
    iterations: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.landmarks is not None and self.landmarks < 1:
            raise ValueError(f"landmarks must be at least 1, got {self.landmarks}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def count(self, call: AttentionCall) -> int:
        """Landmarks: the setting, or what the budget allows; no more than real tokens."""
        assert call.mask is not None
        tokens = [call.n_queries, call.n_keys]
        for valid in (call.mask.query_valid, call.mask.key_valid):
            tokens += [] if valid is None else [int(valid.sum(1).min())]
        most = max(1, min(tokens))
        if self.landmarks is not None:
            return min(self.landmarks, most)
        heads = call.query.shape[:2].numel()
        return knob_for(
            self.budget * exact_products(call),
            lambda count: float(heads * self._cost(call, count)),
            most,
        )

    def _cost(self, call: AttentionCall, count: int) -> int:
        """Multiply-adds of one head."""
        width, value = call.query.shape[3], call.value.shape[3]
        long = (call.n_queries + call.n_keys) * count * (width + value)
        return long + count**2 * (width + value) + 4 * self.iterations * count**3

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        count, mask = self.count(call), rows.mask
        tally.settled["landmarks"] = count
        tally.products += call.query.shape[:2].numel() * self._cost(call, count)
        query = _segment_means(rows.query, _real(mask.query_valid, mask, call.n_queries), count)
        key = _segment_means(rows.key, _real(mask.key_valid, mask, call.n_keys), count)
        from_queries, between, to_keys = (
            rows.rule.logits(a @ b.transpose(2, 3))
            for a, b in ((rows.query, key), (query, key), (query, rows.key))
        )
        if mask.key_valid is not None:
            to_keys = to_keys.masked_fill(~mask.key_valid[:, None, None], -torch.inf)
        inverse = _pseudo_inverse(between.softmax(-1), self.iterations)
        output = from_queries.softmax(-1) @ (inverse @ (to_keys.softmax(-1) @ rows.value))
        return output, rows.lse()


def _real(valid: Tensor | None, mask: AttentionMask, length: int) -> Tensor:
    """Which tokens are no padding, bool ``[B or 1, length]``."""
    if valid is not None:
        return valid
    return torch.ones(1, length, dtype=torch.bool, device=mask.start.device)


def _segment_means(tokens: Tensor, real: Tensor, count: int) -> Tensor:
    """Means over ``count`` segments of the real tokens, ``[B, H, count, D]``."""
    rank = real.long().cumsum(1) - 1
    segment = (rank.clamp(min=0) * count // real.sum(1, keepdim=True).clamp(min=1)).clamp(
        max=count - 1
    )
    member = torch.nn.functional.one_hot(segment, count).to(tokens.dtype) * real[..., None]
    sizes = member.sum(1).clamp(min=1)  # [B or 1, count]
    return (member.transpose(1, 2)[:, None] @ tokens) / sizes[:, None, :, None]


def _pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Of ``[..., m, m]``: equation 9 of the paper, from the norms of each matrix."""
    norms = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
    inverse = matrix.transpose(-1, -2) / norms[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse
