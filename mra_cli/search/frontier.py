"""Which sites get how much: the cheapest choices for every amount of harm. Pure functions.

Harm foretold is a sum over sites and so is cost, so choosing is a multiple-choice knapsack. Taking,
again and again, the upgrade that saves most harm per cost, on the lower convex hull of each site's
options, walks through the optima of its Lagrangian (Everett 1963; Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One way to treat a site.

    Attributes:
        budget: Budget of the method there; 1: the site stays exact.
        harm: Its part of the plan's harm.
        density: Its part of the plan's density.
        ms: Its latency in one pass.
    """

    budget: float
    harm: float
    density: float
    ms: float

    def cost(self, kind: str) -> float:
        """Density, or latency."""
        return self.ms if kind == "latency" else self.density


@dataclass(frozen=True)
class Point:
    """One plan on the frontier: budgets by site, in their order, and their sums."""

    budgets: tuple[float, ...]
    harm: float
    density: float
    ms: float

    def cost(self, kind: str) -> float:
        """Density, or latency."""
        return self.ms if kind == "latency" else self.density


def frontier(sites: Sequence[Sequence[Option]], kind: str = "density") -> list[Point]:
    """The best plans from the cheapest to the most expensive, harm falling.

    Args:
        sites: Options of each site.
        kind: What to save: ``density`` or ``latency``.
    """
    hulls = [hull(options, kind) for options in sites]
    steps = [
        ((after.harm - before.harm) / (after.cost(kind) - before.cost(kind)), site, place + 1)
        for site, kept in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(kept))
    ]
    chosen = [0] * len(hulls)
    points = [_point(hulls, chosen)]
    for _, site, place in sorted(steps):  # steepest first; within a site hulls are in order
        chosen[site] = place
        points.append(_point(hulls, chosen))
    return points


def hull(options: Sequence[Option], kind: str) -> list[Option]:
    """Lower convex hull of harm over cost: options that no mixture of others beats."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost(kind), o.harm)):
        if kept and option.harm >= kept[-1].harm:
            continue
        while len(kept) >= 2 and _slope(kept[-2], option, kind) <= _slope(kept[-2], kept[-1], kind):
            kept.pop()
        kept.append(option)
    return kept


def thinned(count: int, most: int, keep: set[int]) -> list[int]:
    """About ``most`` of ``count`` places on a frontier, evenly spread, and those of ``keep``."""
    return sorted({*range(0, count, max(1, -(-count // most))), count - 1, *keep})


def _slope(first: Option, second: Option, kind: str) -> float:
    return (second.harm - first.harm) / (second.cost(kind) - first.cost(kind))


def _point(hulls: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Point:
    taken = [options[place] for options, place in zip(hulls, chosen, strict=True)]
    return Point(
        tuple(option.budget for option in taken),
        sum(option.harm for option in taken),
        sum(option.density for option in taken),
        sum(option.ms for option in taken),
    )
