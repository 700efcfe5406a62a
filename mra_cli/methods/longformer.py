"""Longformer: a window, and a few tokens that see all and are seen by all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.bands import Band, half_width
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally, runs
from mra_kernels import AttentionMask


@dataclass(frozen=True)
class Longformer(Approximation):
    """A window around each row, and global first tokens (Beltagy et al., arXiv 2004.05150).

    Attributes:
        width: Positions in the window, half on each side.
        first: Tokens at the start of the sequence that see all and are seen by all.
    """

    name: ClassVar[str] = "longformer"
    about: ClassVar[About] = About(
        summary="a window, and first tokens that see all and are seen by all",
        source="Beltagy et al., arXiv 2004.05150",
        patterns=("NS", "CS"),
        cost="N x width",
        adapted="global tokens use the model's one set of projections",
    )

    width: int | None = None
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 2:
            raise ValueError(f"width must be at least 2, got {self.width}")
        if self.first < 0:
            raise ValueError(f"first must be at least 0, got {self.first}")

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        band = Band.of(call, self._half(rows.mask))
        tally.settled["width"] = 2 * band.half
        begin = first_key(rows.mask)
        end = begin + self.first
        tokens = begin + torch.arange(self.first, device=begin.device)
        tokens = tokens.masked_fill(tokens >= call.n_keys, -1)

        def is_global(position: Tensor) -> Tensor:
            return (position >= begin[..., None]) & (position < end[..., None])

        def local_row(row: Tensor, key: Tensor) -> Tensor:
            return ~is_global(row + band.offset)

        def near(row: Tensor, key: Tensor) -> Tensor:
            return local_row(row, key) & ~is_global(key) & band.keep(row, key)

        if self.first:
            own = tokens - band.offset
            rows.add(own.masked_fill((own < 0) | (tokens < 0), -1), None)
            rows.add(runs(call.n_queries, 256, begin.device), tokens, local_row)
        rows.add(band.rows, band.keys, near)
        return rows.output(), rows.lse()

    def _half(self, mask: AttentionMask) -> int:
        if self.width is not None:
            return self.width // 2
        legal = mask.legal_per_row()
        shared = self.first * (mask.n_queries + mask.n_keys) * legal.shape[0]
        entries = self.budget * float(legal.sum())
        return half_width(mask, entries if self.budget == 1.0 else max(1.0, entries - shared))


def first_key(mask: AttentionMask) -> Tensor:
    """Position of the first real key, int64 ``[B or 1, 1, 1, 1]``."""
    if mask.key_valid is None:
        return mask.start.new_zeros(1, 1, 1, 1)
    return mask.key_valid.int().argmax(1)[:, None, None, None]
