"""The picture of `compare`: error against cost."""

from __future__ import annotations

import io
from typing import Any

from mra_cli.bench.plots import check_can_draw
from mra_cli.compare.report import CompareReport, ModelComparison, Row, pareto

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9")  # Okabe and Ito
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(report: CompareReport, kind: str) -> bytes:
    """Error over multiply-adds, and over time, as shares of exact attention's; a row of drawings
    per model and kind of attention, Pareto fronts marked.

    Args:
        kind: ``png`` or ``svg``.

    Raises:
        InputError: matplotlib is missing.
    """
    check_can_draw()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = [(model, pattern) for model in report.models for pattern in model.kinds]
    names = list(dict.fromkeys(row.method for model in report.models for row in model.rows))
    settings: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"svg.hashsalt": "mra-cli", "svg.fonttype": "none"}  # same drawing, same file
    with rc_context(settings):
        figure = Figure(figsize=(12.5, 0.8 + 4.6 * len(places)), layout="constrained")
        panels = figure.subplots(len(places), 2, squeeze=False)
        for (model, pattern), (left, right) in zip(places, panels, strict=True):
            title = f"{model.provenance.model}, {pattern}"
            rows = [row for row in model.rows if row.kind == pattern]
            costs = [row.multiply_adds for row in rows]
            _panel(left, rows, costs, names, f"{title}: multiply-adds", "multiply-adds")
            _panel(right, rows, [row.time for row in rows], names, f"{title}: time", "time")
        handles, labels = [], []
        for axes in panels.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                if label not in labels:
                    handles.append(handle)
                    labels.append(label)
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
        figure.supxlabel(_origin(report.models[0]), fontsize=7.5, color="#444444")
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=160, metadata=metadata)
    return out.getvalue()


def _panel(
    axes: Any, rows: list[Row], costs: list[float], names: list[str], title: str, what: str
) -> None:
    for name in dict.fromkeys(row.method for row in rows if row.method != "vmean"):
        points = [(c, r.error) for c, r in zip(costs, rows, strict=True) if r.method == name]
        if len({error for _, error in points}) == 1:  # the same at every budget
            points = points[:1]
        number = names.index(name)
        style = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linewidth": 2.2 if name == "mra" else 0.9,
            "markersize": 6 if name == "mra" else 4.5,
        }
        axes.plot(*zip(*points, strict=True), label=name, alpha=0.9, **style)
    axes.plot([1.0], [0.0], "*", color="black", markersize=11, label="exact", clip_on=False)
    points = [*zip(costs, (row.error for row in rows), strict=True), (1.0, 0.0)]
    front = sorted(points[i] for i in pareto(points))
    named: set[str] = set()
    for cost, row in zip(costs, rows, strict=True):
        if (cost, row.error) in front and row.method not in named and row.method != "vmean":
            named.add(row.method)
            offset = {"xytext": (-4, -10), "textcoords": "offset points", "ha": "right"}
            axes.annotate(row.method, (cost, row.error), fontsize=7.5, **offset)
    axes.step(
        *zip(*front, strict=True),
        where="post",
        color="black",
        linestyle=":",
        linewidth=1.4,
        label="Pareto front",
        zorder=0,
    )
    floor = [row.error for row in rows if row.method == "vmean"]
    if floor:
        axes.axhline(floor[0], color="#888888", linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(
            "vmean",
            (0.99, floor[0]),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color="#666666",
        )
    axes.set_xscale("log")
    shown = [c for c, row in zip(costs, rows, strict=True) if row.method != "vmean"]
    low, high = min(0.9, *shown) / 1.3, max(1.0, *shown) * 1.3
    axes.set_xlim(low, high)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.0, max(1.05, min(1.6, 1.05 * max(row.error for row in rows))))
    axes.set_xlabel(f"{what}, exact attention = 1")
    axes.set_ylabel("output error (relative)")
    axes.set_title(title, fontsize=10)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)


def _origin(model: ModelComparison) -> str:
    origin = model.provenance
    return f"{origin.inputs}; {origin.threads} threads, {origin.machine}, torch {origin.torch}"
