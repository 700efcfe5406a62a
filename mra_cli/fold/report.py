"""What `fold` found: identities, their costs and gaps; and how far an initialisation is off."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mra_cli.evaluate import Damage
from mra_cli.report import Provenance

SCHEMA = 1


@dataclass(frozen=True)
class Cost:
    """What one form of a site takes.

    Attributes:
        parameters: Numbers in the matrices (or biases) concerned; each matrix entry is also one
            multiply-add per token.
        per_key: Multiply-adds per query and cached key.
        cached: Numbers cached per token.
    """

    parameters: int
    per_key: int
    cached: int


@dataclass(frozen=True)
class IdentityFigures:
    """One identity at one site.

    Attributes:
        identity: One of `mra_cli.fold.identities.IDENTITIES`.
        site: Name of the site.
        before, after: What it takes now, and folded; None: not known.
        reason: Why it is not folded; None: it is.
        gap: Relative change of the attention module's output in float64; None: not to be had.
    """

    identity: str
    site: str
    before: Cost | None
    after: Cost | None
    reason: str | None
    gap: float | None


@dataclass(frozen=True)
class VariantFigures:
    """One site as one of the leaner variants, fitted in closed form.

    Attributes:
        site: Name of the site.
        parameters_before, parameters_after: Of the site's projections.
        gap: Relative error of the module's output on text it was not fitted on.
        constant_gap: The same of the mean output: what knowing nothing gives.
    """

    site: str
    parameters_before: int
    parameters_after: int
    gap: float
    constant_gap: float


@dataclass(frozen=True)
class FoldReport:
    """Everything `fold` found.

    Attributes:
        provenance: Where the figures come from.
        identities: At every site, in the order of the sites.
        parameters: Of the whole model.
        variant: The leaner variant that was fitted, or None.
        variant_sites: Its figures.
        damage: What the written model does, compared with the source; None: nothing was folded.
        parity: Largest relative difference of its output from the source's, over samples.
        written: The directory, or None.
    """

    provenance: Provenance
    identities: tuple[IdentityFigures, ...]
    parameters: int
    variant: str | None = None
    variant_sites: tuple[VariantFigures, ...] = ()
    damage: Damage | None = None
    parity: float | None = None
    written: str | None = None
    schema: int = SCHEMA

    @property
    def folded(self) -> list[IdentityFigures]:
        """Identities that are folded."""
        return [figures for figures in self.identities if figures.reason is None]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)
