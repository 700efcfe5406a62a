"""The tables of `analyze`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from mra_cli.analyze import GOOD_ERROR, POOR_ERROR
from mra_cli.cli._colours import COLOURS
from mra_cli.forecast import ForecastFigures
from mra_cli.report import AnalyzeReport, SiteFigures, method_words


def heading(report: AnalyzeReport) -> list[tuple[str, str]]:
    """Lines that say what was measured on what, with their styles."""
    origin = report.provenance
    length = f"{origin.seq_len} tokens of " if origin.seq_len else ""
    return [
        (
            f"{origin.model} ({origin.model_class}, {origin.dtype}), method "
            f"{method_words(report.method)}",
            "bold",
        ),
        (
            f"{origin.samples} x {length}{origin.inputs}; "
            f"{origin.threads} threads, {origin.machine}, torch {origin.torch}",
            "dim",
        ),
    ]


def tables(report: AnalyzeReport) -> Iterator[Table]:
    """Layers, the whole model, and what else was measured."""
    yield _site_table(report)
    yield _budget_table(report)
    if report.by_budget[0].by_text:
        yield _text_table(report)
    if report.by_budget[0].tasks:
        yield _task_table(report)
    if report.forecast is not None and report.forecast.checks:
        yield _forecast_table(report.forecast)


def _site_table(report: AnalyzeReport) -> Table:
    table = Table(title="Attention output, layer by layer (each layer fed exactly)")
    table.add_column("#", justify="right")
    table.add_column("site", overflow="fold")
    table.add_column("kind")
    table.add_column("exact ms", justify="right")
    budgets = [figures.budget for figures in report.by_budget]
    for budget in budgets:
        table.add_column(f"budget {budget:g}\nerror  mass    ms", justify="right")
    by_key = {(row.site, row.budget): row for row in report.by_site}
    for number, site in enumerate(report.sites):
        rows = [by_key.get((site.name, budget)) for budget in budgets]
        first = next((row for row in rows if row is not None), None)
        if first is None:
            cells = [f"[dim]exact{': ' + escape(site.reason) if site.reason else ''}[/]"]
            table.add_row(str(number), escape(site.name), site.kind, "", *cells)
            continue
        table.add_row(
            str(number),
            escape(site.name),
            site.kind,
            f"{first.exact_ms:.1f}",
            *(_cell(row) for row in rows),
        )
    table.add_section()
    table.add_row("", "mean", "", *_mean_row(report, budgets))
    return table


def _cell(row: SiteFigures | None) -> str:
    if row is None:
        return ""
    colour = "green" if row.error <= GOOD_ERROR else "red" if row.error > POOR_ERROR else "yellow"
    return f"[{colour}]{row.error:.3f}[/]  {100 * row.mass:3.0f}%  {row.method_ms:5.1f}"


def _mean_row(report: AnalyzeReport, budgets: list[float]) -> list[str]:
    cells = []
    exact = 0.0
    for budget in budgets:
        rows = [row for row in report.by_site if row.budget == budget]
        error, mass, took, exact = (
            sum(getattr(row, name) for row in rows) / len(rows)
            for name in ("error", "mass", "method_ms", "exact_ms")
        )
        cells.append(f"{error:.3f}  {100 * mass:3.0f}%  {took:5.1f}")
    return [f"{exact:.1f}", *cells]


def _budget_table(report: AnalyzeReport) -> Table:
    table = Table(title="The whole model, approximated at all these layers together")
    damage = report.by_budget[0].damage.shown()
    names = ["budget", "density", "error", *damage, "attention", "peak MiB (exact)", "verdict"]
    for name in names:
        table.add_column(name, justify="right")
    for figures in report.by_budget:
        table.add_row(
            f"{figures.budget:g}",
            f"{figures.density:.3f}",
            f"{figures.error:.3f}",
            *figures.damage.shown().values(),
            f"{figures.exact_ms / figures.method_ms:.2f}x speed",
            f"{figures.method_bytes / 2**20:.1f} ({figures.exact_bytes / 2**20:.1f})",
            f"[{COLOURS[figures.verdict]}]{figures.verdict}[/]",
        )
    return table


def _text_table(report: AnalyzeReport) -> Table:
    table = Table(title="By text")
    table.add_column("budget", justify="right")
    table.add_column("text", overflow="fold")
    for name in report.by_budget[0].damage.shown():
        table.add_column(name, justify="right")
    for figures in report.by_budget:
        for number, part in enumerate(figures.by_text):
            budget = f"{figures.budget:g}" if number == 0 else ""
            table.add_row(budget, escape(part.text), *part.damage.shown().values())
        table.add_section()
    return table


def _task_table(report: AnalyzeReport) -> Table:
    table = Table(title="At work")
    for name in ("task", "answers", "measure", "exact"):
        table.add_column(name, justify="right" if name in ("answers", "exact") else "left")
    for figures in report.by_budget:
        table.add_column(f"budget {figures.budget:g}", justify="right")
    for at, task in enumerate(report.by_budget[0].tasks):
        for number, measure in enumerate(task.measures):
            first = (task.task, str(task.items)) if number == 0 else ("", "")
            runs = (figures.tasks[at].measures[number] for figures in report.by_budget)
            table.add_row(
                *map(escape, first),
                measure.name,
                measure.shown(measure.exact),
                *(run.shown(run.run) for run in runs),
            )
        table.add_section()
    return table


def _forecast_table(forecast: ForecastFigures) -> Table:
    figure = forecast.figure
    table = Table(title=f"{figure[0].upper()}{figure[1:]} foretold from the errors of the layers")
    for name in ("plan", "foretold", "measured", "off by"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for check in forecast.checks:
        values = (f"{value:.3g}" for value in (check.foretold, check.measured))
        table.add_row(check.plan, *values, f"{100 * check.off:+.0f} %")
    return table
