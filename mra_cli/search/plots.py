"""The frontier, drawn. Readable without colour: series differ in marker and line, too."""

from __future__ import annotations

import io
from typing import Any

from mra_cli.bench.plots import check_can_draw
from mra_cli.search.report import SearchReport


def draw(report: SearchReport, kind: str) -> bytes:
    """Harm over density, and over latency: foretold, and where plans were run, measured.

    Args:
        kind: ``png`` or ``svg``.

    Raises:
        InputError: matplotlib is missing.
    """
    check_can_draw()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"svg.hashsalt": "mra-cli", "svg.fonttype": "none"}  # same drawing, same file
    with rc_context(settings):
        figure = Figure(figsize=(10.5, 4.7), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, report, "density")
        _panel(right, report, "ms")
        left.set_xlabel("share of the scores computed exactly")
        right.set_xlabel("attention of one sample, ms (the sum of single calls)")
        right.axvline(report.exact_ms, color="black", linewidth=1.0)
        right.annotate(
            "exact",
            (report.exact_ms, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -2),
            textcoords="offset points",
            ha="right",
            va="top",
        )
        left.set_ylabel(report.trials[0].damage.harm_words if report.trials else "harm")
        left.legend(frameon=False, fontsize=8.5)
        origin = report.provenance
        wanted = " and ".join(target.words() for target in report.targets)
        figure.suptitle(f"{origin.model}: {wanted}", fontsize=11)
        figure.supxlabel(f"{origin.inputs}; {origin.machine}", fontsize=7.5, color="#444444")
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=160, metadata=metadata)
    return out.getvalue()


def _panel(axes: Any, report: SearchReport, of: str) -> None:
    points = [point for point in report.frontier if point.harm > 0]
    xs = [getattr(point, of) for point in points]
    joined = report.saves == {"density": "density", "ms": "latency"}[of]  # in order, then
    style = {"linestyle": "-"} if joined else {"linestyle": "", "marker": "o", "markersize": 3}
    axes.plot(xs, [p.harm for p in points], color="#0072b2", label="foretold", **style)
    styles = (
        (False, {"color": "#d55e00", "marker": "^"}, "measured, inputs of the search"),
        (True, {"color": "#009e73", "marker": "s"}, "measured, held-out inputs"),
    )
    for held_out, style, label in styles:
        runs = [t for t in report.trials if t.held_out == held_out and t.damage.harm > 0]
        at = [getattr(report.frontier[t.point], of) for t in runs]
        axes.scatter(at, [t.damage.harm for t in runs], s=36, zorder=4, label=label, **style)
    trial = report.verified
    if trial is not None and report.chosen is not None:
        at = getattr(report.frontier[report.chosen], of)
        ring = {"marker": "o", "s": 190, "facecolors": "none", "edgecolors": "black"}
        axes.scatter([at], [trial.damage.harm], zorder=5, label="the plan", **ring)
    axes.set_yscale("log")
    axes.grid(True, color="#dddddd", linewidth=0.6)
