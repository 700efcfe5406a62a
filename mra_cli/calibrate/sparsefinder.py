"""Fit Sparsefinder's projections, and the knobs of its three predictors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mra_cli.calibrate.fits import Captured, Fitted, descend
from mra_cli.calibrate.gold import Graph, gold, logits_of, quality, some_rows
from mra_cli.calls import AttentionCall
from mra_cli.methods.calibration import band
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_cli.methods.sparsefinder import Pairs, Predictor, project

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
BUCKETS = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32)
CLUSTERS = (2, 3, 4, 6, 8, 10, 12, 16, 20)

_LLOYD = 20


@dataclass(frozen=True)
class SparsefinderFit:
    """Linear projections by a triplet hinge loss (arXiv 2109.12188, section 4), Adam.

    Attributes:
        rounds: Width of the projections.
        graph, mass: What is to be predicted, see `gold`.
        steps, rate, margin: Of the fit.
        rows: Random rows per step; and, four times as many, to measure on.
        window, first: Always kept when curves are measured.
    """

    method: ClassVar[str] = "sparsefinder"
    kinds: ClassVar[tuple[str, ...]] = ("NS", "CS", "NC", "CC")

    rounds: int = 4
    graph: Graph = "mass"
    mass: float = 0.8
    steps: int = 100
    rate: float = 0.05
    margin: float = 1.0
    rows: int = 64
    window: int = 11
    first: int = 1

    def __call__(self, captured: Captured, generator: torch.Generator) -> Fitted:
        heads, width = captured.train[0].query.shape[1], captured.train[0].query.shape[3]
        bound = 1 / math.sqrt(width)
        weight = (torch.rand(heads, width, self.rounds, generator=generator) * 2 - 1) * bound
        bias = torch.rand(heads, self.rounds, generator=generator) * 2 - 1
        fitted = {"weight": weight, "bias": bias}

        def loss(step: int) -> Tensor:
            call = captured.train[step % len(captured.train)]
            rows = some_rows(call, self.rows, generator)
            return self._hinge(call, rows, fitted, generator)

        descend([weight, bias], loss, steps=self.steps, rate=self.rate)
        self._settle(captured, fitted, generator)
        return Fitted(fitted, {"graph": self.graph, "curves": self._curves(captured, fitted)})

    def _hinge(
        self, call: AttentionCall, rows: Tensor, fitted: dict[str, Tensor], chance: torch.Generator
    ) -> Tensor:
        """``max(0, margin + sum of wanted distances - sum of as many others)``, mean over rows;
        rows that want more than half of their keys are left out."""
        logits = logits_of(call, rows)
        wanted, legal = gold(logits, self.graph, self.mass), logits > -torch.inf
        counts, others = wanted.sum(-1), legal & ~wanted
        distances = _pairs(call, fitted).distances(rows)
        order = torch.rand(logits.shape, generator=chance).to(logits).masked_fill(~others, -1.0)
        last = order.sort(-1, descending=True).values.gather(-1, counts.clamp(min=1)[..., None] - 1)
        chosen = others & (order >= last)
        gaps = (distances * wanted).sum(-1) - (distances * chosen).sum(-1)
        fair = (counts > 0) & (counts <= others.sum(-1))
        return (torch.relu(self.margin + gaps) * fair).sum() / fair.sum().clamp(min=1)

    def _settle(
        self, captured: Captured, fitted: dict[str, Tensor], generator: torch.Generator
    ) -> None:
        """Thresholds, quantiles and clusters of what was fitted on."""
        near, sides = [], ([], [])  # type: tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]
        for call in captured.train:
            rows = some_rows(call, 4 * self.rows, generator)
            pairs, legal = _pairs(call, fitted), logits_of(call, rows) > -torch.inf
            always = _always(call, rows, self.window, self.first)
            distances = pairs.distances(rows).masked_fill(always, -torch.inf)
            near.append(distances.masked_fill(~legal, torch.inf)[0].flatten(1))
            for side, tokens in zip(sides, _projected(call, fitted), strict=True):
                side.append(tokens[0])
        ordered = torch.cat(near, 1).sort(1).values
        legal_counts = (ordered < torch.inf).sum(1)
        places = torch.tensor(DENSITIES)[:, None] * legal_counts
        fitted["thresholds"] = ordered.gather(1, places.long().T.clamp(min=0)).T.contiguous()
        levels = torch.linspace(0, 1, 101)
        fitted["quantiles"] = torch.stack(
            [torch.quantile(torch.cat(side, 1), levels, dim=1).permute(1, 2, 0) for side in sides]
        )
        both = torch.cat([torch.cat(side, 1) for side in sides], 1)
        for count in CLUSTERS:
            fitted[f"clusters_{count}"] = k_means(both, count, generator)

    def _curves(self, captured: Captured, fitted: dict[str, Tensor]) -> dict[str, Any]:
        """Quality of each predictor at each of its knobs, on held-out samples."""
        chance, curves = torch.Generator().manual_seed(0), dict[str, Any]()
        knobs: dict[Predictor, tuple[float, ...]] = {
            "distance": DENSITIES,
            "quantization": BUCKETS,
            "clustering": CLUSTERS,
        }
        for predictor, values in knobs.items():
            curves[predictor] = [{"knob": value, **_NOTHING} for value in values]
        samples = len(captured.held_out)
        for call in captured.held_out:
            rows = some_rows(call, 4 * self.rows, chance)
            logits = logits_of(call, rows)
            wanted = gold(logits, self.graph, self.mass)
            own = _pairs(call, fitted, ranks=captured.site.kind[0] == "N")
            always = _always(call, rows, self.window, self.first)
            values_ = SoftmaxRows(call, Tally()).value
            for predictor, values in knobs.items():
                for point, knob in enumerate(values):
                    kept = own.kept(predictor, rows, point, knob) | always
                    for name, figure in quality(logits, kept, wanted, values_).items():
                        curves[predictor][point][name] += figure / samples
        return curves


_NOTHING = {"density": 0.0, "recall": 0.0, "mass": 0.0, "error": 0.0}


def k_means(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres ``[H, count, r]`` of clusters of ``[H, L, r]``: k-means++ and Lloyd's rounds."""
    heads, length, width = points.shape
    first = torch.randint(length, (heads, 1), generator=generator)
    centres = points.gather(1, first[..., None].expand(-1, -1, width))
    for _ in range(count - 1):
        far = torch.cdist(points, centres).amin(-1).square() + 1e-12
        drawn = torch.multinomial(far, 1, generator=generator)
        centres = torch.cat([centres, points.gather(1, drawn[..., None].expand(-1, -1, width))], 1)
    for _ in range(_LLOYD):
        nearest = torch.cdist(points, centres).argmin(-1)
        sums = torch.zeros_like(centres).scatter_add(
            1, nearest[..., None].expand_as(points), points
        )
        sizes = centres.new_zeros(heads, count).scatter_add(
            1, nearest, torch.ones_like(nearest, dtype=points.dtype)
        )
        centres = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centres)
    return centres


def _projected(call: AttentionCall, fitted: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    rows = SoftmaxRows(call, Tally())
    return project(rows.query, fitted), project(rows.key, fitted)


def _pairs(call: AttentionCall, fitted: dict[str, Tensor], *, ranks: bool = False) -> Pairs:
    return Pairs(*_projected(call, fitted), fitted, call.mask, ranks=ranks)


def _always(call: AttentionCall, rows: Tensor, window: int, first: int) -> Tensor:
    """Pairs that are kept anyway, bool ``[R, M]``."""
    offset = 0 if call.mask is None else call.mask.query_offset
    return band(window, first, offset)(rows[:, None], torch.arange(call.n_keys))
