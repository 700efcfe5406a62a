"""The mean of the values: what everyone must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally


@dataclass(frozen=True)
class VMean(Approximation):
    """Every row gets the mean of the values it may see: attention without scores, and so without
    whatever else enters them.

    The floor of Skeinformer's comparison (Chen et al., NAACL 2022, arXiv 2112.05359).
    """

    name: ClassVar[str] = "vmean"
    about: ClassVar[About] = About(
        summary="the mean of the visible values, whatever the query",
        source="baseline of Chen et al., NAACL 2022, arXiv 2112.05359",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N",
        budgets="nothing",
    )

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        tally.products += rows.value.numel()
        return rows.output(), rows.lse()  # of rows that reached no key
