"""Sparsefinder: which scores matter, predicted from learned low-dimensional projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Choice
from mra_cli.methods.calibration import Calibrated, band, nearest_point
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_kernels import AttentionMask

_CHOSEN_AT_ONCE = 128

Predictor = Literal["distance", "quantization", "clustering"]


@dataclass(frozen=True)
class Sparsefinder(Calibrated):
    """Softmax over the pairs that a predictor keeps, and a window and the first tokens (Treviso et
    al., ACL 2022, arXiv 2109.12188).

    The graph that the projections learn is, for models whose attention is softmax, the keys that
    hold most of a row's mass. What a predictor keeps follows from the budget by the curve of the
    calibration, until its knob is set.

    Attributes:
        predictor: ``distance``: projections nearer than a threshold. ``quantization``: one of
            their coordinates falls in the same bucket. ``clustering``: the same k-means cluster.
        window: Keys around a row's own that are always kept.
        first: Tokens at the beginning that see all and are seen by all.
        point: The point of the predictor's curve to use, from 0.
    """

    name: ClassVar[str] = "sparsefinder"
    about: ClassVar[About] = About(
        summary="pairs predicted from learned projections, a window and the first tokens",
        source="Treviso et al., ACL 2022, arXiv 2109.12188",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N^2 (pairs are tested one by one)",
        adapted="the graph to predict is most of the softmax mass, where the paper has entmax",
        calibrated=True,
    )

    predictor: Predictor = "distance"
    window: int = 11
    first: int = 1
    point: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0 or self.first < 0 or (self.point or 0) < 0:
            raise ValueError(
                f"window, first and point must be at least 0, got {self.window}, {self.first}, "
                f"{self.point}"
            )

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows, fitted = SoftmaxRows(call, tally), self.fitted
        curve = self.found["curves"][self.predictor]
        point = nearest_point(curve, self.budget) if self.point is None else self.point
        point = min(point, len(curve) - 1)
        query, key = (project(x, fitted) for x in (rows.query, rows.key))
        tally.products += (query.numel() + key.numel()) * rows.query.shape[3]
        pairs = Pairs(query, key, fitted, call.mask, ranks=self.found["kind"][0] == "N")
        always = band(self.window, self.first, rows.mask.query_offset)
        kept = []
        for start in range(0, call.n_queries, _CHOSEN_AT_ONCE):
            part = torch.arange(call.n_queries, device=key.device)[start : start + _CHOSEN_AT_ONCE]
            everywhere = torch.arange(call.n_keys, device=key.device)
            likely = pairs.kept(self.predictor, part, point, curve[point]["knob"])
            kept.append(likely | always(part[:, None], everywhere))
        if self.predictor == "distance":
            tally.products += query.numel() * call.n_keys
        return {"kept": torch.cat(kept, 2)}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        return attend_kept(call, choice["kept"], tally)


def attend_kept(call: AttentionCall, kept: Tensor, tally: Tally) -> tuple[Tensor, Tensor]:
    """Softmax over the pairs in a matrix ``[B, H, N, M]``: output and log-sum-exp."""
    rows = SoftmaxRows(call, tally)
    for start in range(0, call.n_queries, _CHOSEN_AT_ONCE):
        part = kept[:, :, None, start : start + _CHOSEN_AT_ONCE]
        own = torch.arange(start, start + part.shape[3], device=kept.device)
        rows.add(own.view(1, 1, 1, -1), None, lambda row, key, part=part: part)  # type: ignore[misc]
    return rows.output(), rows.lse()


def project(tokens: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Projections ``[B, H, L, r]`` of queries or keys ``[B, H, L, D]``."""
    return tokens @ fitted["weight"].to(tokens) + fitted["bias"].to(tokens)[:, None]


class Pairs:
    """Which pairs a predictor keeps.

    Args:
        query, key: Projections ``[B, H, N or M, r]``.
        fitted: ``weight`` ``[H, D, r]``, ``bias`` ``[H, r]``, ``thresholds`` ``[points, H]``,
            ``quantiles`` ``[2, H, r, 101]`` of queries and keys, ``clusters_C`` ``[H, C, r]``.
        mask: For its padding.
        ranks: Buckets may depend on the whole sequence.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        fitted: dict[str, Tensor],
        mask: AttentionMask | None,
        *,
        ranks: bool,
    ) -> None:
        self._query, self._key, self._fitted, self._mask = query, key, fitted, mask
        self._ranks = ranks
        self._codes: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def kept(self, predictor: Predictor, rows: Tensor, point: int, knob: float) -> Tensor:
        """Pairs of some rows with all keys, bool ``[B, H, R, M]``; masks are not looked at."""
        if predictor == "distance":
            limit = self._fitted["thresholds"][point].to(self._query)[:, None, None]
            return self.distances(rows) < limit
        code = (predictor, int(knob))
        if code not in self._codes:
            make = self._buckets if predictor == "quantization" else self._clusters
            self._codes[code] = make(int(knob))
        query, key = self._codes[code]
        return (query[:, :, rows, None] == key[:, :, None]).any(-1)

    def distances(self, rows: Tensor) -> Tensor:
        """Squared Euclidean distances of rows' projections from all keys', ``[B, H, R, M]``."""
        query, key = self._query[:, :, rows], self._key
        squares = query.square().sum(-1)[..., None] + key.square().sum(-1)[:, :, None]
        return squares - 2 * query @ key.transpose(-1, -2)

    def _buckets(self, count: int) -> tuple[Tensor, Tensor]:
        """Buckets of queries and keys ``[B, H, L, r]``: by rank within the sequence; where later
        tokens must not matter, by the calibration's quantiles."""
        if self._ranks and self._mask is not None:
            valid = self._mask.query_valid, self._mask.key_valid
            return by_rank(self._query, valid[0], count), by_rank(self._key, valid[1], count)
        places = torch.linspace(0, 100, count + 1)[1:-1].round().long()
        edges = self._fitted["quantiles"].to(self._query)[..., places]
        return by_edges(self._query, edges[0]), by_edges(self._key, edges[1])

    def _clusters(self, count: int) -> tuple[Tensor, Tensor]:
        centres = self._fitted[f"clusters_{count}"].to(self._query)
        return tuple(  # type: ignore[return-value]
            (2 * x @ centres.transpose(1, 2) - centres.square().sum(-1)[:, None]).argmax(
                -1, keepdim=True
            )
            for x in (self._query, self._key)
        )


def by_rank(tokens: Tensor, valid: Tensor | None, count: int) -> Tensor:
    """Equally filled buckets of each coordinate of ``[B, H, L, r]``, padding in the last."""
    real = torch.full((1, 1, 1, 1), tokens.shape[2], device=tokens.device)
    if valid is not None:
        tokens = tokens.masked_fill(~valid[:, None, :, None], torch.inf)
        real = valid.sum(-1).clamp(min=1)[:, None, None, None]
    return tokens.argsort(2).argsort(2) // (-(-real // count))


def by_edges(tokens: Tensor, edges: Tensor) -> Tensor:
    """Buckets of each coordinate of ``[B, H, L, r]`` between edges ``[H, r, count - 1]``."""
    each = tokens.transpose(2, 3).contiguous()
    places = edges.expand(len(tokens), -1, -1, -1).contiguous()
    return torch.searchsorted(places, each).transpose(2, 3)
