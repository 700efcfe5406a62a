"""The tables of `compare`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from mra_cli.bench.workload import PATTERNS
from mra_cli.compare.report import ENTROPY_EDGES, CompareReport, ModelComparison, Row, pareto
from mra_cli.evaluate import Damage

_LAYERS_ABREAST = 15


def heading(model: ModelComparison) -> list[tuple[str, str]]:
    """Lines above the tables, with their style."""
    origin = model.provenance
    length = f"{origin.seq_len} tokens of " if origin.seq_len else ""
    doubt = " (measure on real ones before you believe it)" if origin.inputs_synthetic else ""
    return [
        (
            f"{origin.model} ({origin.model_class}, {origin.dtype}), {len(model.sites)} sites",
            "bold",
        ),
        (
            f"{origin.samples} x {length}{origin.inputs}{doubt}; {origin.threads} threads, "
            f"{origin.machine}, torch {origin.torch}",
            "dim",
        ),
    ]


def tables(model: ModelComparison) -> Iterator[Table]:
    """Methods at each budget, by layer, by entropy; what attention is worth; who can't serve."""
    for kind in model.kinds:
        for budget in model.budgets:
            yield _methods(model, kind, budget)
    middle = model.budgets[len(model.budgets) // 2]
    for kind in model.kinds:
        yield from _layers(model, kind, middle)
        yield _entropy(model, kind, middle)
    yield _ablations(model)
    if model.excluded:
        yield _excluded(model)


def agreement(report: CompareReport) -> Iterator[Table]:
    """Whether methods rank alike elsewhere; nothing where there is no elsewhere."""
    found = report.agreements
    if not found:
        return
    table = Table(title="Do methods rank alike by error? Kendall's tau: 1 the same order")
    for name in ("", "and", "budget", "methods", "tau"):
        table.add_column(name, justify="left" if name in ("", "and") else "right")
    for entry in found:
        cells = f"{entry.budget:g}", str(entry.methods), f"{entry.tau:+.2f}"
        table.add_row(escape(entry.first), escape(entry.second), *cells)
    yield table


def _methods(model: ModelComparison, kind: str, budget: float) -> Table:
    rows = model.ranked(kind, budget)
    exact = rows[0]
    caption = "* on the Pareto front: none (nor exact attention) has less error for fewer products"
    by_work = [row.method for row in rows if row.matched == "multiply-adds"]
    if by_work:
        caption += f"; budgets of multiply-adds: {', '.join(sorted(by_work))}"
    table = Table(
        title=f"{kind}, {PATTERNS[kind]}, budget {budget:g}, least error first",
        caption=caption,
    )
    causal = kind[0] == "C"
    names = ["method", "error", "worst", "exact\nscores", "multiply-\nadds", "time", "peak MiB"]
    names += ["whole model"] + (["looks\nahead"] if causal else []) + ["knobs"]
    for name in names:
        left = name in ("method", "whole model", "knobs")
        table.add_column(name, justify="left" if left else "right")
    front = pareto([*((row.multiply_adds, row.error) for row in rows), (1.0, 0.0)])
    for number, row in enumerate(rows):
        whole = model.damage(row)
        cells = [
            row.method + ("*" if number in front else ""),
            f"{row.error:.3f}",
            f"{max(layer.error for layer in row.layers):.3f}",
            f"{100 * row.density:.0f} %",
            f"{100 * row.multiply_adds:.0f} %",
            f"{row.time:.2f}x",
            f"{row.method_bytes / 2**20:.1f}",
            _harm(whole.damage) + _at(whole.sites, len(model.sites)),
        ]
        cells += [f"{row.lookahead:.1%}" if row.lookahead is not None else ""] if causal else []
        table.add_row(*map(escape, cells), escape(_knobs(row)))
    table.add_section()
    memory = f"{exact.exact_bytes / 2**20:.1f}"
    harm = _exact(model.whole[0].damage)
    cells = ["exact", "0", "0", "100 %", "100 %", "1x", memory, harm]
    table.add_row(*cells, *(["0.0%"] if causal else []), "")
    return table


def _layers(model: ModelComparison, kind: str, budget: float) -> Iterator[Table]:
    numbers = [number for number, site in enumerate(model.sites) if site.kind == kind]
    for first in range(0, len(numbers), _LAYERS_ABREAST):
        part = numbers[first : first + _LAYERS_ABREAST]
        table = Table(title=f"{kind}: error at each site, budget {budget:g}")
        table.add_column("method")
        for number in part:
            table.add_column(str(number), justify="right")
        for row in model.ranked(kind, budget):
            errors = {layer.site: layer.error for layer in row.layers}
            found = [errors.get(model.sites[number].name) for number in part]
            cells = ("" if e is None else f"{e:.2f}".removeprefix("0") for e in found)
            table.add_row(escape(row.method), *cells)
        yield table


def _entropy(model: ModelComparison, kind: str, budget: float) -> Table:
    table = Table(
        title=f"{kind}: error by how spread a row's exact attention is, budget {budget:g}",
        caption="entropy as a share of the most it can be: 0 one key, 1 all keys alike",
    )
    table.add_column("method")
    edges = (0.0, *ENTROPY_EDGES)
    shares = model.entropy_rows[kind]
    for low, high, share in zip(edges, edges[1:], shares, strict=False):
        table.add_column(f"{low:g} to {high:g}\n{100 * share:.0f} % of rows", justify="right")
    for row in model.ranked(kind, budget):
        cells = ("-" if error is None else f"{error:.3f}" for error in row.by_entropy)
        table.add_row(escape(row.method), *cells)
    return table


def _ablations(model: ModelComparison) -> Table:
    table = Table(title="What attention is worth: the model without it (first sample)")
    table.add_column("site", overflow="fold")
    table.add_column("mean of V instead")
    table.add_column("nothing instead")
    for entry in model.ablations:
        table.add_row(escape(entry.site), _harm(entry.mean), _harm(entry.nothing))
    table.add_section()
    table.add_row("none (exact)", _exact(model.ablations[0].mean), "")
    return table


def _excluded(model: ModelComparison) -> Table:
    table = Table(title="Can't serve here")
    table.add_column("kind")
    table.add_column("method")
    table.add_column("because")
    for entry in model.excluded:
        table.add_row(entry.kind, escape(entry.method), escape(entry.reason))
    return table


def _harm(damage: Damage) -> str:
    if damage.perplexity is not None:
        return f"perplexity {_three(damage.perplexity)}"
    if damage.cosine_mean is not None:
        return f"cosine {damage.cosine_mean:.4f}"
    if damage.output_change is not None:
        return f"output moves {damage.output_change:.1%}"
    return f"same class {damage.top1_agreement:.1%}"


def _exact(damage: Damage) -> str:
    if damage.perplexity_exact is not None:
        return f"perplexity {_three(damage.perplexity_exact)}"
    if damage.cosine_mean is not None:
        return "cosine 1"
    return "output moves 0 %" if damage.output_change is not None else "same class 100 %"


def _at(sites: int, of: int) -> str:
    return "" if sites == of else f" (at {sites} of {of} sites)"


def _knobs(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.settled.items())


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
