"""Scatterbrain: a window exactly, random features elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.bands import Band, half_width
from mra_cli.methods.base import (
    About,
    Approximation,
    Choice,
    exact_products,
    knob_for,
    reason_against_part,
)
from mra_cli.methods.features import Features, feature_products, orthogonal_features
from mra_cli.methods.rows import SoftmaxRows, Tally


@dataclass(frozen=True)
class Scatterbrain(Approximation):
    """Sparse plus low-rank (Chen et al., NeurIPS 2021, arXiv 2110.15343): keys in a window exactly,
    all others by `Performer`'s features. The window gets a third of a budget's scores, the features
    what is left of its multiply-adds.

    Attributes:
        width: Positions in the window, half on each side.
        features: Random features.
        seed: Of their directions.
    """

    name: ClassVar[str] = "scatterbrain"
    about: ClassVar[About] = About(
        summary="a window exactly, random features for the rest",
        source="Chen et al., NeurIPS 2021, arXiv 2110.15343",
        patterns=("NS", "CS"),
        cost="N x (width + features)",
        budgets="multiply-adds",
        masks="causal",
        honours=("sinks",),
        adapted="a window in place of hashing, as in the comparison of the MRA paper",
    )

    width: int | None = None
    features: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 2:
            raise ValueError(f"width must be at least 2, got {self.width}")
        if self.features is not None and self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""
        return super().reason_against_call(call) or reason_against_part(self, call)

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        if self.width is None:
            entries = self.budget / 3 * float(rows.mask.legal_per_row().sum())
            half = half_width(rows.mask, entries)
        else:
            half = self.width // 2
        band = Band.of(call, half)
        rows.add(band.rows, band.keys, band.keep)
        lse = rows.lse()
        block = band.rows.shape[3]
        count = self.features or knob_for(
            self.budget * exact_products(call) - tally.products,
            lambda count: float(feature_products(call, count, block, band.half)),
            max(call.query.shape[3], call.n_keys),
        )
        tally.settled |= {"width": 2 * band.half, "features": count}
        directions = orthogonal_features(count, call.query.shape[3], self.seed)
        Features.of(rows, directions).add_to(rows, block, band.half, band.keep)
        return rows.output(), lse
