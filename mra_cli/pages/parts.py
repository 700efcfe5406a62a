"""What both pages have: heat maps, tasks, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mra_cli.evaluate import TaskFigures
from mra_cli.pages.elements import Html, choice, facts, heat, joined, section, table, tag
from mra_cli.report import Provenance, SiteFigures

ERROR_AT_FULL_HEAT = 0.5
"""Relative output error that is drawn in the deepest colour."""


def layer_maps(
    names: Sequence[str],
    by_site: Iterable[SiteFigures],
    chosen: Sequence[float] | None = None,
) -> Html:
    """Layer x budget, by error, captured mass and speed; layer x head, by budget.

    Args:
        names: The sites, in order.
        by_site: Their figures.
        chosen: The budget that a plan gives each site, mean over heads, to be marked.
    """
    found = {(row.site, row.budget): row for row in by_site}
    budgets = sorted({budget for _, budget in found})
    rows = [name for name in names if any((name, budget) in found for budget in budgets)]
    marks = {
        name: min(budgets, key=lambda tried: abs(tried - budget))
        for name, budget in zip(names, chosen or (), strict=chosen is not None)
        if budget < 1.0
    }

    def grid(show: Callable[[SiteFigures], str], share: Callable[[SiteFigures], float]) -> Html:
        cells = (
            (
                name,
                *(
                    heat(show(row), share(row), mark=marks.get(name) == budget)
                    if (row := found.get((name, budget)))
                    else ""
                    for budget in budgets
                ),
            )
            for name in rows
        )
        caption = "Columns: budget, the share of the scores that may be computed exactly."
        if marks:
            caption += (
                " Framed: the nearest to what the plan takes; no frame: the site stays exact."
            )
        return table(["site", *(f"{budget:g}" for budget in budgets)], cells, caption=caption)

    views = {
        "output error": grid(lambda r: f"{r.error:.3f}", lambda r: r.error / ERROR_AT_FULL_HEAT),
        "attention mass left out": grid(
            lambda r: f"{100 * (1 - r.mass):.0f} %", lambda r: 1 - r.mass
        ),
        "time over exact": grid(
            lambda r: f"{r.method_ms / r.exact_ms:.2f}x", lambda r: r.method_ms / r.exact_ms / 2
        ),
    }
    heads = {f"{budget:g}": _heads(rows, found, budget) for budget in budgets[:12]}
    return joined(
        [
            section(
                "Layers",
                choice("layers", views, "Show"),
                _scale(),
                note="Every layer fed exactly, and compared on the same queries, keys and values.",
            ),
            section(
                "Heads",
                choice("heads", heads, "Budget"),
                _scale(),
                note="Relative output error of each head, in percent.",
            ),
        ]
    )


def _heads(rows: Sequence[str], found: dict[tuple[str, float], SiteFigures], budget: float) -> Html:
    present = [(name, found[name, budget]) for name in rows if (name, budget) in found]
    most = max((len(row.error_by_head) for _, row in present), default=0)
    cells = (
        (
            name,
            *(
                heat(
                    f"{100 * error:.0f}",
                    error / ERROR_AT_FULL_HEAT,
                    title=f"head {head}: {error:.3f}",
                )
                for head, error in enumerate(row.error_by_head)
            ),
        )
        for name, row in present
    )
    head = ["site", *(str(number) for number in range(most))]
    return table(head, cells, caption=f"Columns: heads; budget {budget:g}.", class_="heads")


def _scale() -> Html:
    words = f"error {ERROR_AT_FULL_HEAT:g} or more"
    return tag("p", "none", tag("i"), words, class_="scale")


def task_table(runs: Sequence[tuple[str, Sequence[TaskFigures]]]) -> Html:
    """Scores at tasks.

    Args:
        runs: What ran, in words, and what it did at the same tasks.
    """
    rows = []
    for at, task in enumerate(runs[0][1]):
        for number, measure in enumerate(task.measures):
            ran = (of[at].measures[number] for _, of in runs)
            scores = (measure.shown(measure.exact), *(one.shown(one.run) for one in ran))
            rows.append((f"{task.task}: {measure.name}", str(task.items), *scores))
    head = ["measure", "answers", "exact", *(words for words, _ in runs)]
    return section("At work", table(head, rows, caption="The model's own tasks, exact and not."))


def provenance(origin: Provenance, more: Iterable[tuple[str, object]] = ()) -> Html:
    """Enough to make the figures again."""
    length = f"{origin.seq_len} tokens of " if origin.seq_len else ""
    pairs = [
        ("command", tag("code", origin.command)),
        ("date", origin.date),
        ("model", f"{origin.model} ({origin.model_class}), {origin.dtype}, on {origin.device}"),
        ("fingerprint", tag("code", origin.model_fingerprint)),
        ("inputs", f"{origin.samples} x {length}{origin.inputs}; seed {origin.seed}"),
        ("their hash", tag("code", origin.inputs_digest)),
        *more,
        ("machine", f"{origin.machine}; {origin.threads} threads"),
        (
            "versions",
            f"mra-cli {origin.mra_cli}, torch {origin.torch}, transformers {origin.transformers}, "
            f"Python {origin.python}",
        ),
    ]
    return section("Where this comes from", facts(pairs))
