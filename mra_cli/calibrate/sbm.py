"""Fit a stochastic block model to the pairs that hold most of the attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calibrate.fits import Captured, Fitted, descend
from mra_cli.calibrate.gold import Graph, gold, logits_of, quality, some_rows
from mra_cli.calls import AttentionCall
from mra_cli.methods.calibration import band
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_cli.methods.sbm import draws, edges, members

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)

_HALVINGS = 40


@dataclass(frozen=True)
class SbmFit:
    """Memberships by a perceptron of queries and keys, fitted to predict pairs (cross-entropy);
    queries and keys themselves stay as they are.

    Attributes:
        clusters: Clusters per head.
        graph, mass: What is to be predicted, see `gold`.
        steps, rate: Of the fit.
        rows: Random rows per step; and, four times as many, to measure on.
        window, first: Always kept when curves are measured.
    """

    method: ClassVar[str] = "sbm"
    kinds: ClassVar[tuple[str, ...]] = ("NS", "CS", "NC", "CC")

    clusters: int = 32
    graph: Graph = "mass"
    mass: float = 0.8
    steps: int = 150
    rate: float = 0.01
    rows: int = 64
    window: int = 1
    first: int = 1

    def __call__(self, captured: Captured, generator: torch.Generator) -> Fitted:
        heads, width = captured.train[0].query.shape[1], captured.train[0].query.shape[3]

        def normal(*shape: int) -> Tensor:
            return torch.randn(heads, *shape, generator=generator) / math.sqrt(width)

        fitted = {
            "w1": normal(width, width) * math.sqrt(2),
            "b1": torch.zeros(heads, width),
            "w2": normal(width, width),
            "b2": torch.zeros(heads, width),
            "clusters": normal(self.clusters, width) * math.sqrt(width),
        }

        def loss(step: int) -> Tensor:
            call = captured.train[step % len(captured.train)]
            rows = some_rows(call, self.rows, generator)
            logits = logits_of(call, rows)
            legal = logits > -torch.inf
            wanted = gold(logits, self.graph, self.mass)
            chance = _chances(call, rows, fitted).clamp(1e-6, 1 - 1e-6)
            entropy = torch.where(wanted, -chance.log(), -(1 - chance).log()) * legal
            return entropy.sum() / legal.sum()

        descend(list(fitted.values()), loss, steps=self.steps, rate=self.rate)
        fitted["scales"] = self._scales(captured, fitted, generator)
        return Fitted(fitted, {"graph": self.graph, "curves": self._curves(captured, fitted)})

    def _scales(
        self, captured: Captured, fitted: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Factors on the chances of each head at which so many pairs are kept, ``[points, H]``."""
        chances, always = [], []
        for call in captured.train:
            rows = some_rows(call, 4 * self.rows, generator)
            legal = (logits_of(call, rows) > -torch.inf)[0].flatten(1)
            sure = self._always(call, rows).expand_as(legal.unflatten(1, (len(rows), -1)))
            chances.append(
                _chances(call, rows, fitted)[0].flatten(1).masked_fill(~legal, torch.nan)
            )
            always.append(sure.flatten(1) & legal)
        chance, sure = torch.cat(chances, 1), torch.cat(always, 1)
        wanted = torch.tensor(DENSITIES)[:, None].expand(-1, len(chance))
        low, high = torch.full_like(wanted, -20.0), torch.full_like(wanted, 20.0)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = torch.stack(
                [
                    torch.where(sure, 1.0, (chance * scale[:, None].exp()).clamp(max=1)).nanmean(1)
                    for scale in middle
                ]
            )
            low, high = (
                torch.where(found < wanted, middle, low),
                torch.where(found < wanted, high, middle),
            )
        return high.exp()

    def _curves(
        self, captured: Captured, fitted: dict[str, Tensor]
    ) -> dict[str, list[dict[str, float]]]:
        """Quality at each density, on held-out samples."""
        chance = torch.Generator().manual_seed(0)
        names = ("density", "recall", "mass", "error")
        curve = [{"knob": knob, **dict.fromkeys(names, 0.0)} for knob in DENSITIES]
        for call in captured.held_out:
            rows = some_rows(call, 4 * self.rows, chance)
            logits, values = logits_of(call, rows), SoftmaxRows(call, Tally()).value
            wanted = gold(logits, self.graph, self.mass)
            likely = _chances(call, rows, fitted)
            offset = 0 if call.mask is None else call.mask.query_offset
            drawn = draws(likely.shape[1], rows + offset, torch.arange(call.n_keys), 0)
            for point, scale in zip(curve, fitted["scales"], strict=True):
                kept = (drawn < likely * scale[:, None, None]) | self._always(call, rows)
                for name, figure in quality(logits, kept, wanted, values).items():
                    point[name] += figure / len(captured.held_out)
        return {"edges": curve}

    def _always(self, call: AttentionCall, rows: Tensor) -> Tensor:
        offset = 0 if call.mask is None else call.mask.query_offset
        return band(self.window, self.first, offset)(rows[:, None], torch.arange(call.n_keys))


def _chances(call: AttentionCall, rows: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Chances of some rows' pairs, ``[B, H, R, M]``."""
    found = SoftmaxRows(call, Tally())
    query = members(found.query[:, :, rows], fitted, call.scaling)
    return edges(query, members(found.key, fitted, call.scaling), fitted)
