"""One score of a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One score, of the exact and of the approximated model.

    Attributes:
        name: What is counted.
        exact, run: The exact model's and the approximated one's.
        higher_is_better: Which way is good.
        percent: It is a share.
    """

    name: str
    exact: float
    run: float
    higher_is_better: bool = True
    percent: bool = False

    def shown(self, value: float) -> str:
        """A score as it is shown."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"
