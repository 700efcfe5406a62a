"""The harm of a plan, foretold from the error of each of its layers alone.

Errors of different layers behave like independent noise: what the model's output loses (KL, 1
minus the cosine, the square of its change) is nearly a sum over layers of their squared errors,
each times how much the model minds that layer, which a run with that layer alone approximated
tells. Where the sum is large it stops being one, so a power of it is fitted through joint runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mra_cli.evaluate import Damage

T = TypeVar("T")

_LEAST = 1e-12
_STEEPEST = 2.0


@dataclass(frozen=True)
class Forecast:
    """``harm = factor * energy ** exponent``, see `energy`."""

    factor: float = 1.0
    exponent: float = 1.0

    def harm(self, energy: float) -> float:
        """Foretold harm of a plan of this energy."""
        return self.factor * max(energy, 0.0) ** self.exponent

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]]) -> Forecast:
        """Through energies and measured harms, by least squares of logarithms.

        One point gives a factor alone. The exponent is kept between 1/2 and 2.
        """
        logs = [(math.log(max(e, _LEAST)), math.log(max(h, _LEAST))) for e, h in points]
        if not logs:
            return cls()
        x0, y0 = (sum(values) / len(logs) for values in zip(*logs, strict=True))
        spread = sum((x - x0) ** 2 for x, _ in logs)
        slope = sum((x - x0) * (y - y0) for x, y in logs) / spread if spread > 1e-6 else 1.0
        exponent = min(max(slope, 1 / _STEEPEST), _STEEPEST)
        return cls(math.exp(y0 - exponent * x0), exponent)


@dataclass(frozen=True)
class Sensitivity:
    """Harm when one site (or some, measured together) is approximated alone.

    Attributes:
        sites: Their names.
        budget: Budget of the method there.
        harm: What it did, see `Damage.harm`.
    """

    sites: tuple[str, ...]
    budget: float
    harm: float


def grouped(items: Sequence[T], size: int) -> list[list[T]]:
    """Neighbours, so many at a time."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def minded(
    sensitivities: Sequence[Sensitivity], squares: Mapping[tuple[str, float], float]
) -> dict[str, float]:
    """Harm per squared error, by site; those measured together share it.

    Args:
        squares: `SiteFigures.square` by site and budget.
    """
    found: dict[str, float] = {}
    for group in sensitivities:
        together = sum(squares[site, group.budget] for site in group.sites)
        found |= dict.fromkeys(group.sites, group.harm / max(together, 1e-12))
    return found


def energy(squares: Mapping[str, float], minds: Mapping[str, float]) -> float:
    """Sum of squared errors over sites, each times how much the model minds that site.

    Args:
        squares: `SiteFigures.square` by site; sites that stay exact have none.
        minds: Harm per squared error, by site.
    """
    return sum(minds[site] * square for site, square in squares.items())


@dataclass(frozen=True)
class ForecastCheck:
    """A joint run beside what was foretold without it.

    Attributes:
        plan: What was run, in words.
        foretold, measured: The figure.
    """

    plan: str
    foretold: float
    measured: float

    @property
    def off(self) -> float:
        """By how much of the measured figure the forecast was off; above 0: too high."""
        return self.foretold / self.measured - 1.0 if self.measured else math.inf


@dataclass(frozen=True)
class ForecastFigures:
    """What plans at these sites do, foretold from the errors of their layers.

    Attributes:
        figure: What is foretold, in words.
        minds: Harm per squared error, by site.
        factor, exponent: Of `Forecast`, through all joint runs with one budget.
        checks: How far such forecasts were off.
    """

    figure: str
    minds: dict[str, float]
    factor: float
    exponent: float
    checks: tuple[ForecastCheck, ...]

    def of(self, squares: Mapping[str, float]) -> float:
        """The figure foretold for a plan.

        Args:
            squares: `SiteFigures.square` by approximated site, at the plan's budgets.
        """
        return Forecast(self.factor, self.exponent).harm(energy(squares, self.minds))


def foretold_figure(damages: Sequence[Damage]) -> tuple[str, list[float]]:
    """The figure that can be foretold for these runs, in words, and its values: the increase of the
    loss where there is one in all of them, else what `Damage.harm` is.
    """
    rises = [damage.loss_increase for damage in damages]
    if all(rise is not None and rise > 0 for rise in rises):
        return "loss increase", [rise for rise in rises if rise is not None]
    return damages[0].harm_words, [damage.harm for damage in damages]


def checked_forecast(
    minds: Mapping[str, float],
    squares: Mapping[float, Mapping[str, float]],
    damages: Mapping[float, Damage],
    mixed: tuple[str, Mapping[str, float], Damage] | None,
) -> ForecastFigures:
    """A forecast through the joint runs of an analysis, and how far such forecasts are off.

    Budgets between others are foretold from those others, and a plan of mixed budgets from all.

    Args:
        minds: Harm per squared error, by site.
        squares: By budget, `SiteFigures.square` of each site.
        damages: By budget, of all sites together.
        mixed: A plan in words, the squares of its sites, and its damage.
    """
    runs = [*damages.values()] + ([mixed[2]] if mixed else [])
    figure, values = foretold_figure(runs)
    points = {
        budget: (energy(squares[budget], minds), value)
        for budget, value in zip(damages, values, strict=False)
    }
    checks = []
    for budget in sorted(points)[1:-1]:
        others = [point for other, point in points.items() if other != budget]
        spent, value = points[budget]
        foretold = Forecast.fitted(others).harm(spent)
        checks.append(ForecastCheck(f"budget {budget:g}, from the others", foretold, value))
    fitted = Forecast.fitted(list(points.values()))
    if mixed is not None:
        words, mixed_squares, _ = mixed
        checks.append(ForecastCheck(words, fitted.harm(energy(mixed_squares, minds)), values[-1]))
    return ForecastFigures(figure, dict(minds), fitted.factor, fitted.exponent, tuple(checks))
