"""Attention to neighbours alone: the baseline of every sparse method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.bands import Band, half_width
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally


@dataclass(frozen=True)
class Window(Approximation):
    """Softmax over the keys around a row's own position (before it, in causal calls).

    Attributes:
        width: Positions in the window, half on each side.
    """

    name: ClassVar[str] = "window"
    about: ClassVar[About] = About(
        summary="the keys around each row's own position",
        source="baseline; local attention of Parmar et al., ICML 2018, arXiv 1802.05751",
        patterns=("NS", "CS"),
        cost="N x width",
    )

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 2:
            raise ValueError(f"width must be at least 2, got {self.width}")

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        if self.width is None:
            half = half_width(rows.mask, self.budget * float(rows.mask.legal_per_row().sum()))
        else:
            half = self.width // 2
        tally.settled["width"] = 2 * half
        band = Band.of(call, half)
        rows.add(band.rows, band.keys, band.keep)
        return rows.output(), rows.lse()
