"""Combiner with fixed spans: the own segment exactly, one summary of every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice, reason_against_part
from mra_cli.methods.rows import SoftmaxRows, Tally, groups


@dataclass(frozen=True)
class Combiner(Approximation):
    """A softmax over the keys of the own segment and one summary of each other segment (Ren et al.,
    NeurIPS 2021, arXiv 2107.05768, its fixed pattern).

    A summary's key is the segment's mean key, its value what the segment's mean query attends to
    within the segment; it counts as many keys as it stands for.

    Attributes:
        segment: Tokens of a segment.
    """

    name: ClassVar[str] = "combiner-fixed"
    about: ClassVar[About] = About(
        summary="the own segment exactly, one summary key and value per other segment",
        source="Combiner: Ren et al., NeurIPS 2021, arXiv 2107.05768",
        patterns=("NS", "CS"),
        cost="N x (segment + N / segment)",
        masks="causal",
        honours=("soft-cap", "sinks"),
        adapted="mean pooling and log(segment length), which training would replace",
    )

    segment: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment must be at least 1, got {self.segment}")

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""
        return super().reason_against_call(call) or reason_against_part(self, call)

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows, length = SoftmaxRows(call, tally), call.n_keys
        size = self.segment or max(1, round(self.budget * length))
        tally.settled["segment"] = size
        own = groups(length, size, call.query.device)
        rows.add(own, own)
        lse = rows.lse()
        more, valid = -length % size, rows.mask.key_valid
        real = rows.key.new_ones(1, length) if valid is None else valid.to(rows.key)
        real = pad(real, (0, more)).unflatten(1, (-1, size))[:, None]  # [B or 1, 1, G, size]
        query, key, value = (
            pad(x, (0, 0, 0, more)).unflatten(2, (-1, size))
            for x in (rows.query, rows.key, rows.value)
        )
        counts = real.sum(3)
        mean_query, mean_key = (
            (x * real[..., None]).sum(3) / counts.clamp(min=1)[..., None] for x in (query, key)
        )
        inside = rows.rule.logits((mean_query[:, :, :, None] @ key.transpose(3, 4))[:, :, :, 0])
        weights = inside.masked_fill(real == 0, torch.finfo(inside.dtype).min).softmax(-1)
        summary = (weights[:, :, :, None] @ value)[:, :, :, 0]  # [B, H, G, Dv]
        tally.products += inside.numel() * (key.shape[4] + value.shape[4])
        logits = rows.rule.logits(query @ mean_key[:, :, None].transpose(3, 4))
        logits = logits + counts.log()[:, :, None, None]
        segment = torch.arange(own.shape[2], device=own.device)
        hidden = segment[:, None] <= segment if rows.mask.is_causal else segment[:, None] == segment
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
        rows.add_scored(own, logits, summary[:, :, None])
        return rows.output(), lse
