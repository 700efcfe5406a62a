"""Performer: softmax attention by positive random features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import (
    About,
    Approximation,
    Choice,
    exact_products,
    knob_for,
    reason_against_part,
)
from mra_cli.methods.features import BLOCK, Features, feature_products, orthogonal_features
from mra_cli.methods.rows import SoftmaxRows, Tally


@dataclass(frozen=True)
class Performer(Approximation):
    """FAVOR+ (Choromanski et al., ICLR 2021, arXiv 2009.14794): orthogonal positive features,
    stabilised in log space, masked after the feature map.

    Attributes:
        features: Random features.
        seed: Of their directions.
    """

    name: ClassVar[str] = "performer"
    about: ClassVar[About] = About(
        summary="positive orthogonal random features of the softmax kernel",
        source="Choromanski et al., ICLR 2021, arXiv 2009.14794",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N x features",
        budgets="multiply-adds",
        masks="causal",
        honours=("sinks",),
    )

    features: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features is not None and self.features < 1:
            raise ValueError(f"features must be at least 1, got {self.features}")

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""
        reason = super().reason_against_call(call)
        if reason is None and call.mask is not None and call.mask.is_causal:
            reason = reason_against_part(self, call)
        return reason

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        lse = rows.lse()
        count = self.features or knob_for(
            self.budget * exact_products(call),
            lambda count: float(feature_products(call, count, BLOCK, None)),
            max(call.query.shape[3], call.n_keys),
        )
        tally.settled["features"] = count
        directions = orthogonal_features(count, call.query.shape[3], self.seed)
        Features.of(rows, directions).add_to(rows)
        return rows.output(), lse
