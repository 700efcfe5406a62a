"""The harm of a plan, foretold from the error of each of its layers alone.

Errors of different layers behave like independent noise: what the model's output loses (KL, 1
minus the cosine, the square of its change) is nearly a sum over layers of their squared errors,
each times how much the model minds that layer. Where the sum is large it stops being one, so a
power of it is fitted where two joint runs or more are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def energy(errors: Mapping[str, float], minded: Mapping[str, float] | None = None) -> float:
    """Sum of squared relative errors over sites, each times how much the model minds that site.

    Args:
        errors: Relative output error by site; sites that stay exact have none.
        minded: Harm per squared error by site; None: all alike.
    """
    return sum((1.0 if minded is None else minded[s]) * e * e for s, e in errors.items())
