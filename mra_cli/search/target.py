"""What a plan has to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mra_cli.errors import InputError
from mra_cli.evaluate import Damage


@dataclass(frozen=True)
class Figure:
    """A figure that can be a target.

    Attributes:
        of: Its value; None if the model has no such figure.
        words: What it is.
        least: It has to be at least the target; else at most.
        power: Of what is missing (of 1, for shares to keep) that `harm` grows with.
    """

    of: Callable[[Damage], float | None]
    words: str
    least: bool = False
    power: int = 1


FIGURES = {
    "max-loss-increase": Figure(lambda d: d.loss_increase, "loss increase"),
    "max-kl": Figure(lambda d: d.kl, "KL, nats"),
    "min-agreement": Figure(lambda d: d.top1_agreement, "top-1 agreement", least=True, power=2),
    "min-cosine": Figure(lambda d: d.cosine_mean, "embedding cosine", least=True),
    "max-output-change": Figure(lambda d: d.output_change, "output change", power=2),
}


@dataclass(frozen=True)
class Target:
    """One figure and its bound.

    Attributes:
        name: A key of `FIGURES`, or ``density``.
        value: The bound.
    """

    name: str
    value: float

    def check_fits(self, damage: Damage, model: str) -> None:
        """Refuse a target that says nothing of this model.

        Raises:
            InputError: The model has no such figure.
        """
        if self.name != "density" and FIGURES[self.name].of(damage) is None:
            fitting = [name for name, figure in FIGURES.items() if figure.of(damage) is not None]
            raise InputError(
                f"{model} has no {FIGURES[self.name].words} to keep; use --"
                + " or --".join([*fitting, "density"])
            )

    def excess(self, damage: Damage, density: float) -> float:
        """Harm reached over harm allowed, in terms of `harm`: at most 1 if the target holds."""
        if self.name == "density":
            return density / self.value
        figure = FIGURES[self.name]
        value = figure.of(damage)
        assert value is not None
        reached, allowed = (1 - value, 1 - self.value) if figure.least else (value, self.value)
        if allowed <= 0:
            return 0.0 if reached <= 0 else float("inf")
        return max(0.0, reached / allowed) ** figure.power

    def words(self) -> str:
        """``loss increase at most 1 %``."""
        if self.name == "density":
            return f"density at most {self.value:g}"
        figure = FIGURES[self.name]
        percent = self.name in ("max-loss-increase", "max-output-change", "min-agreement")
        shown = f"{100 * self.value:g} %" if percent else f"{self.value:g}"
        return f"{figure.words} at {'least' if figure.least else 'most'} {shown}"


def holds(targets: tuple[Target, ...], damage: Damage, density: float) -> bool:
    """Whether all targets hold."""
    return all(target.excess(damage, density) <= 1.0 for target in targets)
