"""The page of `search`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from mra_cli.pages.charts import Series, chart
from mra_cli.pages.elements import Html, heat, page, section, table, tag
from mra_cli.pages.parts import (
    layer_maps,
    provenance,
    task_table,
)
from mra_cli.report import method_words
from mra_cli.search.report import PlanPoint, SearchReport, Trial


def search_page(report: SearchReport) -> str:
    """The report as one HTML page."""
    origin = report.provenance
    chosen = None if report.chosen is None else report.frontier[report.chosen]
    parts = [_answer(report), _frontier(report)]
    if report.trials:
        parts.append(_trials(report))
    if report.tasks:
        parts.append(task_table([("plan", report.tasks)]))
    parts.append(_plan(report, chosen))
    if report.plan is not None:
        parts.append(_heads(report.plan))
    if report.speeds:
        parts.append(_speeds(report))
    budgets = None if chosen is None else chosen.budgets
    parts.append(layer_maps(report.names, report.by_site, budgets))
    held_out = f"{report.held_out_samples} x {report.held_out}"
    more = [
        ("verified on", held_out),
        ("their hash", tag("code", report.held_out_digest)),
        ("method", method_words(report.method)),
        ("took", f"{report.seconds:.1f} s"),
    ]
    parts.append(provenance(origin, more))
    wanted = " and ".join(target.words() for target in report.targets)
    return page(
        f"A plan for {origin.model}",
        f"mra-cli search, {origin.date[:10]}: {wanted}, with as little {report.saves} as can be",
        *parts,
    )


def _answer(report: SearchReport) -> Html:
    found = report.plan is not None
    card = tag(
        "article",
        tag("p", "A plan was found" if found else "No plan", class_="verdict"),
        tag("p", report.answer),
        *([tag("p", report.break_even)] if report.break_even else []),
        class_=f"card {'yes' if found else 'no'}",
    )
    return tag("div", card, class_="cards")


def _frontier(report: SearchReport) -> Html:
    points = [point for point in report.frontier if point.harm > 0]
    if not points:
        return section("The frontier", tag("p", "Nothing is cheaper than exact attention."))
    harm = report.trials[0].damage.harm_words if report.trials else "harm"
    x_of: dict[str, Callable[[PlanPoint], float]] = {
        "density": lambda point: point.density,
        "latency": lambda point: point.ms,
    }
    charts = []
    for x_label, x in x_of.items():
        kind: Literal["line", "dots"] = "line" if x_label == report.saves else "dots"
        lines = [Series("foretold", [(x(p), p.harm) for p in points], kind, 1)]
        sides = (
            (False, "measured, inputs of the search", 3),
            (True, "measured, held-out inputs", 2),
        )
        for held_out, label, colour in sides:
            runs = [t for t in report.trials if t.held_out == held_out and t.damage.harm > 0]
            places = [(x(report.frontier[t.point]), t.damage.harm) for t in runs]
            titles = [f"{t.damage.harm:.2e}, targets {_held(t)}" for t in runs]
            lines.append(Series(label, places, "dots", colour, titles))
        trial = report.verified
        if trial is not None and trial.damage.harm > 0:
            place = (x(report.frontier[trial.point]), trial.damage.harm)
            lines.append(Series("the plan", [place], "ring", 1))
        summary = f"{harm} over {x_label}, foretold and measured"
        words = {"latency": "attention of one sample, ms (sum of single calls)"}.get(
            x_label, x_label
        )
        charts.append(chart(lines, x_label=words, y_label=harm, summary=summary, log_y=True))
    return section(
        "The frontier",
        tag("div", *charts, class_="charts"),
        note="Each point of the line is a plan: the least harm foretold for what it costs. "
        f"Exact attention takes {report.exact_ms:.0f} ms.",
    )


def _trials(report: SearchReport) -> Html:
    names = list(report.trials[0].damage.shown())
    rows = [
        (
            "held out" if trial.held_out else "of the search",
            f"{trial.density:.3f}",
            *trial.damage.shown().values(),
            f"{trial.damage.harm:.2e}",
            f"{trial.foretold:.2e}",
            _held(trial),
        )
        for trial in report.trials
    ]
    if report.uniform is not None and report.verified is not None:
        shown = (*report.uniform.shown().values(), f"{report.uniform.harm:.2e}", "", "")
        density = f"{report.verified.density:.3f}"
        rows.append(("held out, one budget for all", density, *shown))
    head = ["inputs", "density", *names, "harm", "foretold", "targets"]
    caption = "All sites of a plan approximated together, in the order they were run."
    return section("Plans that were run", table(head, rows, caption=caption))


def _plan(report: SearchReport, chosen: PlanPoint | None) -> Html:
    alone = {s: group for group in report.sensitivities for s in group.sites}
    most = max(group.harm for group in report.sensitivities) or 1.0
    rows = []
    for number, (name, kind) in enumerate(zip(report.names, report.kinds, strict=True)):
        group = alone[name]
        shared = f" (with {len(group.sites) - 1} more)" if len(group.sites) > 1 else ""
        cells = [name, kind, heat(f"{group.harm:.2e}{shared}", group.harm / most)]
        if chosen is not None:
            budget = chosen.budgets[number]
            cells.append("exact" if budget == 1.0 else f"{budget:.3g}")
        rows.append(cells)
    budget = report.sensitivities[0].budget
    head = ["site", "kind", f"harm alone, at {budget:g}", *(["plan"] if chosen else [])]
    caption = "What approximating one site alone does to the model, and what the plan gives it."
    return section("Sites", table(head, rows, caption=caption))


def _heads(plan: dict[str, Any]) -> Html:
    """What each head gets, if heads of a site differ."""
    given = {name: site.get("head_budgets") for name, site in plan["sites"].items()}
    most = max((len(budgets) for budgets in given.values() if budgets), default=0)
    rows = [
        (name, *(heat(f"{budget:g}", budget) for budget in budgets))
        for name, site in plan["sites"].items()
        for budgets in [given[name] or [site["budget"]] * most]
    ]
    if most == 0:
        return Html("")
    head = ["site", *(str(number) for number in range(most))]
    caption = "Columns: heads. Share of the scores computed exactly; 1: all of them."
    return section("Budgets of the heads", table(head, rows, caption=caption, class_="heads"))


def _speeds(report: SearchReport) -> Html:
    lines = [
        Series("exact", [(s.n_tokens, s.exact_ms) for s in report.speeds], "lined dots", 1),
        Series("plan", [(s.n_tokens, s.method_ms) for s in report.speeds], "lined dots", 3),
    ]
    drawn = chart(
        lines,
        x_label="tokens",
        y_label="attention at the plan's sites, ms",
        summary="Latency over length, exact and under the plan",
        doubling_x=True,
        log_y=True,
    )
    return section("Break-even", tag("div", drawn, class_="charts"), note=report.break_even)


def _held(trial: Trial) -> str:
    return "hold" if trial.holds else "fail"
