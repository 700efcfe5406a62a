"""The page of `analyze`."""

from __future__ import annotations

from mra_cli.forecast import ForecastFigures
from mra_cli.pages.charts import Series, chart
from mra_cli.pages.elements import Html, page, section, table, tag
from mra_cli.pages.parts import (
    layer_maps,
    provenance,
    task_table,
)
from mra_cli.report import AnalyzeReport, method_words

_CARDS = {"yes": "yes", "with care": "care", "no": "no"}


def analyze_page(report: AnalyzeReport) -> str:
    """The report as one HTML page."""
    origin = report.provenance
    parts: list[Html] = [_cards(report), _whole(report)]
    if report.by_budget[0].by_text:
        parts.append(_texts(report))
    if report.by_budget[0].tasks:
        runs = [(f"budget {f.budget:g}", f.tasks) for f in report.by_budget]
        parts.append(task_table(runs))
    parts.append(layer_maps([site.name for site in report.sites], report.by_site))
    if report.forecast is not None:
        parts.append(_forecast(report.forecast))
    left = [site for site in report.sites if site.verdict != "patch"]
    if left:
        rows = [(s.name, tag("td", f"{s.verdict}: {s.reason}", class_="words")) for s in left]
        parts.append(
            section("Left exact", table(["site", "why"], rows, caption="Sites not approximated."))
        )
    method = ("method", method_words(report.method))
    parts.append(provenance(origin, [method, ("took", f"{report.seconds:.1f} s")]))
    return page(
        f"Attention of {origin.model}, approximated",
        f"mra-cli analyze, {origin.date[:10]}: method {report.method['method']} on {origin.inputs}",
        *parts,
    )


def _cards(report: AnalyzeReport) -> Html:
    cards = (
        tag(
            "article",
            tag("h3", f"Budget {figures.budget:g}"),
            tag("p", figures.verdict, class_="verdict"),
            tag("p", figures.summary),
            class_=f"card {_CARDS[figures.verdict]}",
        )
        for figures in report.by_budget
    )
    return tag("div", *cards, class_="cards")


def _whole(report: AnalyzeReport) -> Html:
    names = list(report.by_budget[0].damage.shown())
    rows = [
        (
            f"{figures.budget:g}",
            f"{figures.density:.3f}",
            f"{figures.error:.3f}",
            *figures.damage.shown().values(),
            f"{figures.exact_ms:.0f}",
            f"{figures.method_ms:.0f}",
            f"{figures.method_bytes / 2**20:.1f} ({figures.exact_bytes / 2**20:.1f})",
        )
        for figures in report.by_budget
    ]
    costs = ["exact, ms", "approximated, ms", "peak MiB (exact)"]
    head = ["budget", "density", "error", *names, *costs]
    harm = report.by_budget[0].damage.harm_words
    points = [(f.density, f.damage.harm, f.method_ms, f.budget) for f in report.by_budget]
    points = [point for point in points if point[1] > 0]
    charts = []
    if points:
        titles = [f"budget {budget:g}: {h:.2e}" for _, h, _, budget in points]
        for x_label, xs in (
            ("density", [p[0] for p in points]),
            ("attention of one sample, ms", [p[2] for p in points]),
        ):
            pairs = [(x, p[1]) for x, p in zip(xs, points, strict=True)]
            measured = Series(
                f"{report.method['method']}, measured", pairs, "lined dots", 1, titles
            )
            charts.append(
                chart(
                    [measured],
                    x_label=x_label,
                    y_label=harm,
                    summary=f"{harm} over {x_label}",
                    log_y=True,
                )
            )
    return section(
        "The whole model",
        table(head, rows, caption="Approximated at all layers together."),
        tag("div", *charts, class_="charts"),
    )


def _texts(report: AnalyzeReport) -> Html:
    names = list(report.by_budget[0].damage.shown())
    rows = [
        (f"budget {figures.budget:g}: {part.text}", *part.damage.shown().values())
        for figures in report.by_budget
        for part in figures.by_text
    ]
    return section("By text", table(["text", *names], rows, caption="The same, for each text."))


def _forecast(forecast: ForecastFigures) -> Html:
    rows = [
        (check.plan, f"{check.foretold:.3g}", f"{check.measured:.3g}", f"{100 * check.off:+.0f} %")
        for check in forecast.checks
    ]
    words = (
        f"{forecast.figure} is foretold as {forecast.factor:.3g} x (sum over layers of how much "
        f"the model minds the layer x error squared) ^ {forecast.exponent:.2f}."
    )
    caption = f"{forecast.figure}, foretold without the run and measured in it."
    head = ["plan", "foretold", "measured", "off by"]
    return section("Forecast", table(head, rows, caption=caption), note=words)
