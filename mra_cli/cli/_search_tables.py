"""The tables of `search`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from mra_cli.report import method_words
from mra_cli.search.frontier import thinned
from mra_cli.search.report import SearchReport

_ROWS = 9


def heading(report: SearchReport) -> list[tuple[str, str]]:
    """Lines that say what was searched on what, with their styles."""
    origin = report.provenance
    length = f"{origin.seq_len} tokens of " if origin.seq_len else ""
    words = " and ".join(target.words() for target in report.targets)
    return [
        (
            f"{origin.model} ({origin.model_class}, {origin.dtype}), method "
            f"{method_words(report.method)}",
            "bold",
        ),
        (f"Wanted: {words}, with as little {report.saves} as can be.", "bold"),
        (
            f"Searched on {origin.samples} x {length}{origin.inputs}; verified on "
            f"{report.held_out_samples} x {length}{report.held_out}; {origin.threads} threads, "
            f"{origin.machine}, torch {origin.torch}",
            "dim",
        ),
    ]


def tables(report: SearchReport) -> Iterator[Table]:
    """The frontier, the joint runs, and the plan."""
    yield _sites(report)
    yield _frontier(report)
    if report.trials:
        yield _trials(report)
    if report.tasks:
        yield _tasks(report)


def remarks(report: SearchReport) -> list[str]:
    """What the tables don't say."""
    lines = [report.break_even] if report.break_even else []
    runs = [t for t in report.trials if t.damage.harm > 0][1:]  # the first teaches the factor
    off = {
        where: [abs(t.foretold / t.damage.harm - 1) for t in runs if t.held_out == held_out]
        for where, held_out in (("the inputs of the search", False), ("held-out inputs", True))
    }
    said = [f"{sum(v) / len(v):.0%} on {where}" for where, v in off.items() if v]
    if said:
        lines.append(f"Harm foretold for joint runs was off by {' and '.join(said)}, on average.")
    return lines


def _sites(report: SearchReport) -> Table:
    table = Table(title="Sites, each measured alone")
    for name in ("#", "site", "kind"):
        table.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
    by_key = {(row.site, row.budget): row for row in report.by_site}
    tried = sorted({row.budget for row in report.by_site})
    ends = (tried[0], tried[len(tried) // 2], tried[-1])
    for budget in dict.fromkeys(ends):
        table.add_column(f"error\nat {budget:g}", justify="right")
    alone = report.sensitivities[0].budget
    table.add_column(f"harm alone\nat {alone:g}", justify="right")
    table.add_column("plan", justify="right")
    chosen = None if report.chosen is None else report.frontier[report.chosen].budgets
    harm = {s: (g.harm, len(g.sites)) for g in report.sensitivities for s in g.sites}
    for number, (site, kind) in enumerate(zip(report.names, report.kinds, strict=True)):
        value, together = harm[site]
        plan = "" if chosen is None else "exact" if chosen[number] == 1 else f"{chosen[number]:.3g}"
        table.add_row(
            str(number),
            escape(site),
            kind,
            *(f"{by_key[site, budget].error:.3f}" for budget in dict.fromkeys(ends)),
            f"{value:.2e}" + (f" / {together}" if together > 1 else ""),
            plan,
        )
    return table


def _frontier(report: SearchReport) -> Table:
    table = Table(title="The frontier, foretold (on the inputs of the search)")
    for name in ("density", "harm", "attention, ms", "speed", "measured", ""):
        table.add_column(name, justify="right")
    measured = {trial.point: trial for trial in report.trials if not trial.held_out}
    keep = set() if report.chosen is None else {report.chosen}
    for place in thinned(len(report.frontier), _ROWS, keep):
        point = report.frontier[place]
        trial = measured.get(place)
        table.add_row(
            f"{point.density:.3f}",
            f"{point.harm:.2e}",
            f"{point.ms:.0f}",
            f"{report.exact_ms / point.ms:.2f}x",
            "" if trial is None else f"{trial.damage.harm:.2e}",
            "<- the plan" if place == report.chosen else "",
        )
    return table


def _trials(report: SearchReport) -> Table:
    table = Table(title="Plans run, all sites together")
    columns = report.trials[0].damage.shown()
    for name in ("inputs", "density", *columns, "harm", "foretold", "targets"):
        table.add_column(name, justify="left" if name == "inputs" else "right")
    for trial in report.trials:
        table.add_row(
            "held out" if trial.held_out else "of the search",
            f"{trial.density:.3f}",
            *trial.damage.shown().values(),
            f"{trial.damage.harm:.2e}",
            f"{trial.foretold:.2e}",
            "[green]hold[/]" if trial.holds else "[red]fail[/]",
        )
    if report.uniform is not None and report.verified is not None:
        table.add_section()
        table.add_row(
            "held out, one budget for all",
            f"{report.verified.density:.3f}",
            *report.uniform.shown().values(),
            f"{report.uniform.harm:.2e}",
            "",
            "",
        )
    return table


def _tasks(report: SearchReport) -> Table:
    table = Table(title="At work")
    for name in ("task", "answers", "measure", "exact", "plan"):
        table.add_column(name, justify="left" if name in ("task", "measure") else "right")
    for task in report.tasks:
        for number, measure in enumerate(task.measures):
            first = (escape(task.task), str(task.items)) if number == 0 else ("", "")
            scores = (measure.shown(value) for value in (measure.exact, measure.run))
            table.add_row(*first, measure.name, *scores)
    return table
