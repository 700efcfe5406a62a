"""What `explain` found: per head, per site, and back from JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mra_cli.errors import InputError
from mra_cli.report import Provenance
from mra_cli.sites import Site

SCHEMA = 1

SAME_OUTPUT = 1e-6
"""Relative change of the output up to which a part counts as giving the same."""

PARTS = ("effective", "effective sum 1", "least norm", "fewest keys")
"""In the order of `mra_cli.explain.parts`."""


@dataclass(frozen=True)
class PartFigures:
    """One part of attention rows, mean over rows.

    Attributes:
        part: One of `PARTS`.
        norm: ``||part|| / ||row||``.
        row_sum: Sum of the entries.
        negative: Share of legal entries below zero.
        keys: Entries that are not zero.
        top_keys: Share of the row's largest entries that are among the part's.
        total_variation, hellinger: Distances from the row, 0 to 1; None unless a distribution.
        jensen_shannon: Divergence from the row in bits, 0 to 1; None unless a distribution.
        output_error: Largest relative change of the output, over rows.
    """

    part: str
    norm: float
    row_sum: float
    negative: float
    keys: float
    top_keys: float
    total_variation: float | None
    hellinger: float | None
    jensen_shannon: float | None
    output_error: float


@dataclass(frozen=True)
class Lost:
    """What a method makes of the same rows.

    Attributes:
        weights_error: ``||difference|| / ||row||`` of attention weights (Frobenius over rows).
        effective_error: The same of their effective parts.
        unseen: Share of the difference's squared norm that lies in the null space of the values,
            where it changes no output.
        output_error: ``||difference|| / ||output||``.
    """

    weights_error: float
    effective_error: float
    unseen: float
    output_error: float


@dataclass(frozen=True)
class HeadFigures:
    """One head at one site.

    Attributes:
        site, head: Which.
        keys: Legal keys of a row, mean.
        rank_low, rank, rank_high: Rank of the values that a row sees: least, mean, most.
        parts: The parts, in the order of `PARTS`.
        lost: What the method loses; None: it leaves these calls exact.
    """

    site: str
    head: int
    keys: float
    rank_low: int
    rank: float
    rank_high: int
    parts: tuple[PartFigures, ...]
    lost: Lost | None


@dataclass(frozen=True)
class ExplainReport:
    """Everything `explain` found.

    Attributes:
        provenance: Where the figures come from.
        method: Name and settings of the method whose loss is told.
        rows: Rows looked at, per head and sample.
        top: How many largest entries `PartFigures.top_keys` compares.
        sites: The attention sites that were looked at.
        heads: The figures.
        seconds: Wall time, loading left out.
    """

    provenance: Provenance
    method: dict[str, Any]
    rows: int
    top: int
    sites: tuple[Site, ...]
    heads: tuple[HeadFigures, ...]
    seconds: float
    schema: int = SCHEMA

    @property
    def failed(self) -> list[HeadFigures]:
        """Heads with a part that does not give the same output."""
        return [h for h in self.heads if max(p.output_error for p in h.parts) > SAME_OUTPUT]

    def of(self, site: Site) -> list[HeadFigures]:
        """The heads of a site."""
        return [head for head in self.heads if head.site == site.name]

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ExplainReport:
        """The report in ``text``.

        Raises:
            InputError: Not a report of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"report schema must be {SCHEMA}, got {data['schema']}")
            heads = [
                HeadFigures(
                    **{
                        **head,
                        "parts": tuple(PartFigures(**part) for part in head["parts"]),
                        "lost": None if head["lost"] is None else Lost(**head["lost"]),
                    }
                )
                for head in data["heads"]
            ]
            return cls(
                provenance=Provenance(**data["provenance"]),
                method=data["method"],
                rows=data["rows"],
                top=data["top"],
                sites=tuple(Site.from_dict(site) for site in data["sites"]),
                heads=tuple(heads),
                seconds=data["seconds"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a report of mra-cli explain: {error}") from error


def mean(heads: list[HeadFigures], figure: Callable[[HeadFigures], float]) -> float:
    """Mean of a figure over heads."""
    return fmean(figure(head) for head in heads)
