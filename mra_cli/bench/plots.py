"""Drawings of benchmarks. Readable without colour: series differ in marker and line, too."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from mra_cli.bench.report import BenchReport, BenchRow, ModelRow, Trend
from mra_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = BenchRow | ModelRow

FORMATS = ("png", "svg")

_STYLES: list[dict[str, Any]] = [  # colour-blind safe (Okabe and Ito), of different lightness
    {"color": "#0072b2", "marker": "s", "linestyle": "--"},
    {"color": "#d55e00", "marker": "^", "linestyle": "-."},
    {"color": "#009e73", "marker": "D", "linestyle": ":"},
    {"color": "#cc79a7", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#8c6d00", "marker": "P", "linestyle": (0, (8, 2))},
    {"color": "#56b4e9", "marker": "X", "linestyle": (0, (1, 1))},
]


def check_can_draw() -> None:
    """Fail before the work, not after it.

    Raises:
        InputError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs the package matplotlib; install it with: pip install 'mra-cli[plot]'"
        )


def draw(report: BenchReport, kind: str) -> bytes:
    """Latency over length, with break-even marked, beside speed-up against error (over length for
    whole models); a row of drawings per pattern.

    Args:
        kind: One of `FORMATS`.

    Raises:
        InputError: matplotlib is missing.
    """
    check_can_draw()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups: list[tuple[str, Sequence[Row]]]
    if report.model_rows:
        groups = [("model", report.model_rows)]
    else:
        patterns = dict.fromkeys(row.pattern for row in report.rows)
        groups = [(p, [row for row in report.rows if row.pattern == p]) for p in patterns]
    settings: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"svg.hashsalt": "mra-cli", "svg.fonttype": "none"}  # same drawing, same file
    with rc_context(settings):
        figure = Figure(figsize=(10.5, 0.6 + 4.1 * len(groups)), layout="constrained")
        engine: Any = figure.get_layout_engine()
        engine.set(hspace=0.06, wspace=0.05)
        panels = figure.subplots(len(groups), 2, squeeze=False)
        for (pattern, rows), (left, right) in zip(groups, panels, strict=True):
            trends = {(t.method, t.setting): t for t in report.trends if t.pattern == pattern}
            _latency(left, rows, trends, pattern)
            _speedup(right, rows, pattern)
        figure.suptitle(f"{report.subject}, {report.dtype}", fontsize=11)
        figure.supxlabel(f"{report.inputs}; {report.machine}", fontsize=7.5, color="#444444")
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=160, metadata=metadata)
    return out.getvalue()


def _latency(
    axes: Any,
    rows: Sequence[Row],
    trends: dict[tuple[str, str], Trend],
    pattern: str,
) -> None:
    points = [_point(row) for row in rows]
    exact: dict[int, list[float]] = {}
    for length, exact_ms, _, _ in points:
        exact.setdefault(length, []).append(exact_ms)
    lengths = sorted(exact)
    middle = [sorted(exact[n])[len(exact[n]) // 2] for n in lengths]
    axes.plot(lengths, middle, color="black", marker="o", linewidth=1.8, label="exact")
    for number, series in enumerate(_series(rows)):
        style = _STYLES[number % len(_STYLES)]
        mine = [p for p, row in zip(points, rows, strict=True) if row.series == series]
        axes.plot(
            [p[0] for p in mine],
            [p[2] for p in mine],
            label=f"{_label(series)}{_break_even(trends.get(series))}",
            markerfacecolor="white",
            linewidth=1.5,
            **style,
        )
        start = trends[series].measured.length if series in trends else None
        if start is not None:
            at = next(p for p in mine if p[0] == start)
            ring = {"marker": "o", "s": 150, "facecolors": "none", "linewidths": 1.4}
            axes.scatter([at[0]], [at[2]], edgecolors=style["color"], zorder=5, **ring)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, labels=[_short(n) for n in lengths])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.12)
    _label_y(axes, "")
    axes.set_xlabel("tokens" if pattern == "model" else "keys")
    axes.set_ylabel("prefill, ms (median)" if pattern == "model" else "latency, ms (median)")
    axes.set_title(_title(pattern, "latency; circled: break-even as measured"), fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8.5)


def _speedup(axes: Any, rows: Sequence[Row], pattern: str) -> None:
    """Against error for single calls, over length for whole models (whose harm is in words)."""
    axes.axhline(1.0, color="black", linewidth=1.0)
    for number, series in enumerate(_series(rows)):
        mine = [row for row in rows if row.series == series]
        xs = [row.error if isinstance(row, BenchRow) else row.n_tokens for row in mine]
        ys = [row.speedup for row in mine]
        style = {**_STYLES[number % len(_STYLES)], "linewidth": 1.0}
        axes.plot(xs, ys, label=_label(series), markerfacecolor="white", **style)
        for place in (0, -1)[: len(mine)]:
            row = mine[place]
            if isinstance(row, BenchRow):
                offset = {"xytext": (6, 4 if place else -10), "textcoords": "offset points"}
                axes.annotate(_short(row.n_keys), (xs[place], ys[place]), fontsize=7.5, **offset)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.15)
    _label_y(axes, "x")
    if pattern == "model":
        lengths = sorted({_point(row)[0] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, labels=[_short(n) for n in lengths])
        axes.set_xlabel("tokens")
    else:
        axes.set_xlim(
            0.0, 1.15 * max(row.error for row in rows if isinstance(row, BenchRow)) + 0.01
        )
        axes.set_xlabel("approximation error (relative, of the output)")
    axes.set_ylabel("speed-up")
    what = "speed-up" if pattern == "model" else "speed-up against error; numbers: keys"
    axes.set_title(_title(pattern, what), fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.annotate(
        "exact",
        (1.0, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _label_y(axes: Any, unit: str) -> None:
    """1, 2, 5, 10, ... where they suffice; else, over less than a decade, evenly spaced numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

    low, high = axes.get_ylim()
    steps = [m * 10.0**k for k in range(-4, 8) for m in (1, 2, 5)]
    ticks = [tick for tick in steps if low <= tick <= high]
    if len(ticks) < 3:
        even = [float(tick) for tick in MaxNLocator(5).tick_values(low, high)]
        ticks = [tick for tick in even if low <= tick <= high]
    while len(ticks) > 8:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")][-8:]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}{unit}" for tick in ticks]))


def _point(row: BenchRow | ModelRow) -> tuple[int, float, float, float]:
    """Length, exact and method milliseconds, speed-up."""
    if isinstance(row, BenchRow):
        return row.n_keys, row.exact_p50_ms, row.method_p50_ms, row.speedup
    return row.n_tokens, row.exact_prefill_ms, row.method_prefill_ms, row.speedup


def _series(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(row.series for row in rows))


def _label(series: tuple[str, str]) -> str:
    return f"{series[0]} at {series[1]}"


def _break_even(trend: Trend | None) -> str:
    if trend is None:
        return ""
    if trend.measured.length is None:
        return " (slower throughout)"
    fitted = trend.fitted.length
    return f" (from {trend.measured.length:.0f}" + (f"; fit {fitted:.0f})" if fitted else ")")


def _title(pattern: str, what: str) -> str:
    return what if pattern == "model" else f"{pattern}: {what}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)
