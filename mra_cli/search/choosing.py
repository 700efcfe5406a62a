"""Which point of the frontier: narrowed down on the calibration's inputs, verified on others."""

from __future__ import annotations

from mra_cli.search.report import Trial
from mra_cli.search.workbench import Workbench

_MOST_TRIALS = 8
_MOST_REPAIRS = 6
_FORECASTS = 4
"""Trials whose place the forecast says; later ones halve what is left."""

_CLOSE = 0.01
"""Share of the cost of exact attention that is not worth another run."""


LEAST_SAVED = 0.05
"""Share of the cost of exact attention that a plan has to save to be one."""


def choose(bench: Workbench) -> int | None:
    """Place of the cheapest point that holds on the held-out inputs; None: none does.

    Raises:
        InputError: Time is up.
    """
    if worth_running(bench) == 0:
        return None
    if not bench.setup.harm_targets:
        return _densest(bench)
    place = _cheapest_on_calibration(bench)
    fails, passes = -1, None
    for _ in range(_MOST_REPAIRS):
        if place is None:
            break
        trial = bench.run(place, held_out=True)
        if trial.holds:
            passes = place
        else:
            fails = place
        if passes is None:
            place = _tighter(bench, trial)
            continue
        if fails < 0 or passes - fails <= 1 or _gap(bench, fails, passes) < _CLOSE:
            break
        place = (fails + passes) // 2
    return passes


def _densest(bench: Workbench) -> int | None:
    """The least harmful point that is no denser than wanted."""
    wanted = allowed = min(target.value for target in bench.setup.targets)
    for number in range(_MOST_REPAIRS):
        fitting = [place for place, point in enumerate(bench.points) if point.density <= allowed]
        if not fitting:
            return None
        place = max(fitting)
        if number == 0:
            bench.run(place, held_out=False)  # teaches the forecast
        trial = bench.run(place, held_out=True)
        if trial.holds:
            return place
        allowed = 0.999 * bench.points[place].density * wanted / trial.density  # others need more
    return None


def _cheapest_on_calibration(bench: Workbench) -> int | None:
    """The cheapest point that keeps the calibration's inputs: where the forecast, better after each
    run, puts the limit; then halving what lies between.
    """
    worth = worth_running(bench)
    fails, passes = -1, worth
    place = passes // 2
    for number in range(_MOST_TRIALS):
        trial = bench.run(place, held_out=False)
        fails, passes = (fails, place) if trial.holds else (place, passes)
        close = passes < worth and _gap(bench, max(fails, 0), passes) < _CLOSE
        if passes - fails <= 1 or close:
            break
        halfway = (fails + passes) // 2
        place = _first_below(bench, _allowed(bench, trial)) if number < _FORECASTS else halfway
        place = min(max(place, fails + 1), passes - 1)
    return passes if passes < worth else None


def _tighter(bench: Workbench, trial: Trial) -> int | None:
    """The next point to verify after one that failed; None: there is none that could hold."""
    if any(
        target.excess(trial.damage, trial.density) > 1
        for target in bench.setup.targets
        if target.name == "density"
    ):
        return None  # tighter is denser
    foretold = bench.forecast.harm(bench.points[trial.point].harm)
    allowed = _allowed(bench, trial) * foretold / max(trial.damage.harm, 1e-12)
    place = max(trial.point + 1, _first_below(bench, 0.95 * allowed))
    return place if place < worth_running(bench) else None


def worth_running(bench: Workbench) -> int:
    """How many points, from the cheapest on, save enough to be plans."""
    most = (1.0 - LEAST_SAVED) * bench.exact_cost
    return sum(point.cost(bench.setup.saves) <= most for point in bench.points[:-1])


def _gap(bench: Workbench, first: int, second: int) -> float:
    """How much more the second point costs, as a share of what exact attention costs."""
    kind = bench.setup.saves
    return (bench.points[second].cost(kind) - bench.points[first].cost(kind)) / bench.exact_cost


def _allowed(bench: Workbench, trial: Trial) -> float:
    """Harm at which the targets would just hold, if they scale with what this run did."""
    excess = max(target.excess(trial.damage, 0.0) for target in bench.setup.harm_targets)
    return trial.damage.harm / max(excess, 1e-3)


def _first_below(bench: Workbench, harm: float) -> int:
    """The cheapest point whose foretold harm is at most that."""
    foretold = (bench.forecast.harm(point.harm) for point in bench.points)
    return next(place for place, found in enumerate(foretold) if found <= harm or found == 0.0)
