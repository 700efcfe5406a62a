"""What the rows of a benchmark say together: break-even, growth, and what to mind."""

from __future__ import annotations

from collections.abc import Sequence

from mra_cli.bench.decoding import as_decoded
from mra_cli.bench.report import BenchRow, ModelRow, Trend
from mra_cli.bench.scaling import BreakEven, fitted_break_even, growth_exponent, measured_break_even
from mra_cli.calls import AttentionCall
from mra_cli.environment import Environment
from mra_cli.methods import Method


def trends(rows: Sequence[BenchRow] | Sequence[ModelRow], timed: str) -> tuple[Trend, ...]:
    """Break-even and growth of every pattern, method and setting, over its lengths."""
    groups: dict[tuple[str, str, str], list[tuple[int, float, float, float]]] = {}
    for row in rows:
        if isinstance(row, BenchRow):
            point = row.n_keys, row.exact_p50_ms, row.method_p50_ms, row.speedup
            groups.setdefault((row.pattern, *row.series), []).append(point)
        else:
            point = row.n_tokens, row.exact_prefill_ms, row.method_prefill_ms, row.speedup
            groups.setdefault(("model", *row.series), []).append(point)
    found = []
    for key, points in groups.items():
        lengths, exact, method, speedup = (list(column) for column in zip(*points, strict=True))
        if timed == "decode":
            fitted = BreakEven(None, "decoding is linear for exact attention, too")
        else:
            fitted = fitted_break_even(lengths, exact, method)
        found.append(
            Trend(
                *key,
                exact_exponent=growth_exponent(lengths, exact),
                method_exponent=growth_exponent(lengths, method),
                fitted=fitted,
                measured=measured_break_even(lengths, speedup),
            )
        )
    return tuple(found)


def busy_notes(environment: Environment) -> list[str]:
    """What about the machine may spoil timings."""
    notes = []
    if environment.threads > environment.cpus:
        notes.append(
            f"{environment.threads} threads share {environment.cpus} CPUs: use at most as many, or "
            "timings say little."
        )
    elif environment.load is not None and environment.load + environment.threads > (
        environment.cpus + 0.7
    ):
        notes.append(
            f"The machine was busy at the start (load {environment.load:g} on {environment.cpus} "
            "CPUs): ratios are of pairs taken in turn, but look at p90."
        )
    return notes


def left_exact(steps: Sequence[tuple[Method, AttentionCall]]) -> list[str]:
    """Which of these calls of decoding a patched model would answer exactly, and why."""
    found: dict[str, None] = {}
    for method, call in steps:
        reason = method.reason_for_exact(as_decoded(call))
        if reason is not None:
            found[f"Patched by {method.name}, a model decodes exactly where {reason}."] = None
    return list(found)


def call_notes(random: bool, rows: Sequence[BenchRow]) -> list[str]:
    """What to mind about figures of single calls.

    Args:
        random: Inputs were.
    """
    notes = []
    if random:
        notes.append(
            "Random inputs have no structure for a method to find: believe the timings, not the "
            "errors; --inputs MODEL times real queries, keys and values."
        )
    moved: dict[str, list[str]] = {}
    for row in rows:
        if row.lookahead is not None and row.lookahead > 0:
            method, setting = row.series
            moved.setdefault(row.pattern, []).append(f"{method} at {setting} {row.lookahead:.1%}")
    for pattern, amounts in moved.items():
        notes.append(
            f"{pattern}: other tokens in the second half move outputs of the first half, "
            f"which exact attention keeps: {', '.join(amounts)}."
        )
    unchecked = sorted({row.n_keys for row in rows if row.rounding is None})
    if unchecked:
        lengths = ", ".join(map(str, unchecked))
        notes.append(f"Not checked against the float64 reference, too long: {lengths}.")
    return notes
