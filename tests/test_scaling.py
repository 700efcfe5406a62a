"""Statistics of a benchmark, on curves whose answer is known, and how its numbers are taken."""

from __future__ import annotations

import math

import pytest
import torch

from mra_cli.bench.scaling import fitted_break_even, growth_exponent, measured_break_even
from mra_cli.measure import PairedTimes, paired_times_ms, percentile, with_resident_bytes

LENGTHS = [256, 512, 1024, 2048, 4096]


# --- statistics ------------------------------------------------------------------------------


def test_break_even_of_known_curves():
    exact = [1e-4 * n * n + 2 for n in LENGTHS]
    found = fitted_break_even(LENGTHS, exact, [0.05 * n + 30 for n in LENGTHS])
    assert found.length == pytest.approx((0.05 + math.sqrt(0.05**2 + 4e-4 * 28)) / 2e-4)
    assert found.note == ""
    quarter = [0.25e-4 * n * n + 50 for n in LENGTHS]  # a fixed budget is no straight line
    found = fitted_break_even(LENGTHS, exact, quarter)
    assert found.length == pytest.approx(math.sqrt(48 / 0.75e-4))
    assert "both quadratic: N^" in found.note


def test_break_even_agrees_with_the_published_benchmark():
    """Times of vanilla attention and ABC that its script ships; published: 1877."""
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    vanilla = [0.472, 0.628, 0.721, 0.981, 3.67, 18.4]
    abc = [0.648, 0.59, 0.602, 0.91, 1.006, 1.509]
    assert fitted_break_even(lengths, vanilla, abc).length == pytest.approx(1877, rel=0.02)


@pytest.mark.parametrize(
    ("exact", "method", "why"),
    [
        (lambda n: 3 * n + 5, lambda n: n + 1, "did not grow quadratically"),
        (lambda n: 5000 - 1e-4 * n * n, lambda n: n, "did not grow quadratically"),
        (lambda n: n * n + 5, lambda n: 1e-9 * n, "faster at every length"),
        (lambda n: n * n, lambda n: 2 * n * n, "slower from some length on"),
    ],
)
def test_no_break_even_is_none(exact, method, why):
    found = fitted_break_even(LENGTHS, [*map(exact, LENGTHS)], [*map(method, LENGTHS)])
    assert found.length is None
    assert why in found.note


def test_fits_say_when_they_guess():
    exact = [n * n for n in LENGTHS]
    beyond = fitted_break_even(LENGTHS, exact, [n + 1e9 for n in LENGTHS])
    assert beyond.length == pytest.approx(31623, rel=1e-3)
    assert "beyond the lengths measured" in beyond.note
    for lengths in ([512], [512, 1024], [512, 512, 1024]):
        few = fitted_break_even(lengths, [1.0] * len(lengths), [1.0] * len(lengths))
        assert (few.length, "3 lengths" in few.note) == (None, True)
        assert growth_exponent(lengths, [1.0] * len(lengths)) is None


def test_measured_break_even_wants_no_relapse():
    assert measured_break_even(LENGTHS, [0.5, 1.2, 0.9, 1.5, 2.0]).length == 2048
    assert measured_break_even(LENGTHS[::-1], [2.0, 1.5, 0.9, 1.2, 0.5]).length == 2048
    assert measured_break_even(LENGTHS, [1.1] * 5).length == 256
    assert measured_break_even(LENGTHS, [1.1] * 5).note == "the shortest measured"
    slow = measured_break_even(LENGTHS, [2.0, 2.0, 2.0, 2.0, 1.0])
    assert slow.length is None and "slower at 4096" in slow.note


@pytest.mark.parametrize("power", [0.9, 1.15, 2.0])
def test_growth_exponent(power):
    assert growth_exponent(LENGTHS, [3 * n**power for n in LENGTHS]) == pytest.approx(power)


def test_percentiles_and_pairs():
    assert percentile((5.0, 1.0, 3.0), 0.5) == 3.0
    assert percentile((0.0, 10.0), 0.9) == pytest.approx(9.0)
    assert percentile((7.0,), 0.9) == 7.0
    assert PairedTimes((10.0, 20.0, 90.0), (5.0, 5.0, 10.0)).speedup == 4.0, "median of ratios"
    order = []
    times = paired_times_ms(lambda: order.append("A"), lambda: order.append("B"), pairs=4)
    assert "".join(order) == "ABABABAB"
    assert len(times.first_ms) == len(times.second_ms) == 4
    assert len(paired_times_ms(list, list, pairs=9, enough_ms=1e-9).first_ms) == 1


def test_memory_that_is_gone_again_was_seen():
    """As scratch space inside one operation is: no tensor of it is left to count."""

    def scratch() -> int:
        return len(bytes(40 << 20).replace(b"\0", b"\1"))

    _, held = with_resident_bytes(scratch, torch.device("cpu"))
    if held is None:
        pytest.skip("this system does not tell")
    assert 35 << 20 < held < 140 << 20
