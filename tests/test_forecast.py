"""Forecasts: the arithmetic, and whether they come true on a real model."""

from __future__ import annotations

import pytest

from mra_cli.evaluate import Damage
from mra_cli.forecast import Forecast, Sensitivity, checked_forecast, energy, grouped, minded


def test_a_power_law_is_found_again():
    law = Forecast(0.3, 1.2)
    fitted = Forecast.fitted([(x, law.harm(x)) for x in (0.01, 0.2, 3.0)])
    assert (fitted.factor, fitted.exponent) == pytest.approx((0.3, 1.2))
    assert Forecast.fitted([(0.5, 2.0)]).harm(0.25) == pytest.approx(1.0), "one point: a factor"
    assert Forecast.fitted([]) == Forecast(1.0, 1.0)
    assert Forecast.fitted([(1.0, 1.0), (1.1, 50.0)]).exponent == 2.0, "no wild extrapolation"


def test_sites_share_what_they_did_together():
    squares = {("a", 0.2): 0.01, ("b", 0.2): 0.04, ("c", 0.2): 0.09}
    minds = minded([Sensitivity(("a", "b"), 0.2, 0.5), Sensitivity(("c",), 0.2, 0.18)], squares)
    assert minds == pytest.approx({"a": 10.0, "b": 10.0, "c": 2.0})
    assert energy({"a": 0.01, "b": 0.04}, minds) == pytest.approx(0.5)
    assert energy({}, minds) == 0.0
    assert grouped(range(5), 2) == [[0, 1], [2, 3], [4]]


def test_checks_are_made_without_the_run_they_check():
    """A harm that is the sum of squares is foretold to the digit; a run that differs is missed by
    just as much as it differs."""
    minds = {"a": 1.0, "b": 4.0}
    errors = {b: {"a": (1 - b) ** 2, "b": (1 - b) ** 2 / 4} for b in (0.1, 0.4, 0.7)}
    damages = {b: Damage(kl=0.1 * energy(e, minds), top1_agreement=0.9) for b, e in errors.items()}
    mixed = {"a": errors[0.1]["a"], "b": errors[0.7]["b"]}
    run = Damage(kl=0.2 * energy(mixed, minds), top1_agreement=0.9)
    found = checked_forecast(minds, errors, damages, ("mixed", mixed, run))
    assert found.figure == "KL, nats"
    middle, other = found.checks
    assert middle.off == pytest.approx(0.0, abs=1e-9)
    assert other.off == pytest.approx(-0.5)
    assert found.of(mixed) == pytest.approx(other.foretold)


def test_the_loss_is_foretold_where_it_rises_everywhere():
    minds, errors = {"a": 1.0}, {0.1: {"a": 0.16}, 0.5: {"a": 0.04}}

    def forecast(low: float, high: float) -> str:
        damages = {
            b: Damage(loss=loss, loss_exact=2.0, kl=0.1, top1_agreement=0.9)
            for b, loss in ((0.1, low), (0.5, high))
        }
        return checked_forecast(minds, errors, damages, None).figure

    assert forecast(2.2, 2.1) == "loss increase"
    assert forecast(2.2, 1.9) == "KL, nats", "a loss that fell has no logarithm"


@pytest.mark.checkpoints
def test_on_a_real_encoder_forecasts_come_true(minilm):
    from mra_cli.analyze import analyze
    from mra_cli.inputs import make_samples
    from mra_cli.methods import make_method
    from mra_cli.report import AnalyzeReport

    samples = make_samples(minilm, seq_len=256, count=2)
    report = analyze(minilm, samples, make_method("mra", 0.1), [0.1, 0.25, 0.5], forecast=True)
    assert report.forecast is not None
    middle, mixed = report.forecast.checks
    assert abs(middle.off) < 0.25
    assert abs(mixed.off) < 0.5
    assert AnalyzeReport.from_json(report.to_json()) == report
    uniform = {row.site: row.square for row in report.by_site if row.budget == 0.25}
    measured = report.by_budget[1].damage.harm
    assert report.forecast.of(uniform) == pytest.approx(measured, rel=0.25)
