"""The tables of `explain`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from mra_cli.explain.report import PARTS, SAME_OUTPUT, ExplainReport, HeadFigures, mean


def blocks(report: ExplainReport) -> Iterator[Table | tuple[str, str]]:
    """What to print, top to bottom: tables, and lines with their style."""
    origin = report.provenance
    length = f"{origin.seq_len} tokens of " if origin.seq_len else ""
    yield f"{origin.model} ({origin.model_class}, {origin.dtype})", "bold"
    yield (
        f"{report.rows} rows of each head in {origin.samples} x {length}{origin.inputs}; seed "
        f"{origin.seed}",
        "dim",
    )
    yield _parts(report)
    yield (
        "Effective: what the values' null space leaves of a row (sum 1: without its ones). Least "
        "norm and fewest keys: distributions. TV: total variation from the row; top "
        f"{report.top}: how many of its largest entries are among theirs.",
        "dim",
    )
    worst = {
        part: max(head.parts[index].output_error for head in report.heads)
        for index, part in enumerate(PARTS)
    }
    found = ", ".join(f"{part} {error:.0e}" for part, error in worst.items())
    if report.failed:
        yield (
            f"FAILED: every part must give the same output to {SAME_OUTPUT:g}, and {found}",
            "bold red",
        )
    else:
        yield f"Same output as the whole row, largest relative difference: {found}.", ""
    yield _lost(report)
    yield f"Took {report.seconds:.1f} s after loading.", "dim"


def _parts(report: ExplainReport) -> Table:
    table = Table(title="Parts of attention that give the same output (means over rows and heads)")
    table.add_column("#", justify="right")
    table.add_column("site", overflow="fold")
    table.add_column("keys\nlegal", justify="right")
    table.add_column("rank\nof V", justify="right")
    table.add_column("effective part\nnorm  sum  < 0", justify="right")
    table.add_column("sum 1\n< 0", justify="right")
    for name in ("least-norm distribution", "fewest keys"):
        table.add_column(f"{name}\nkeys  from row  top {report.top}", justify="right", no_wrap=True)
    for number, site in enumerate(report.sites):
        heads = report.of(site)
        low = min(head.rank_low for head in heads)
        high = max(head.rank_high for head in heads)
        table.add_row(
            str(number),
            escape(site.name),
            f"{mean(heads, lambda head: head.keys):.0f}",
            f"{low}" if low == high else f"{low}-{high}",
            f"{_of(heads, 0, 'norm'):.2f} {_of(heads, 0, 'row_sum'):5.2f} "
            f"{_of(heads, 0, 'negative'):4.0%}",
            f"{_of(heads, 1, 'negative'):.0%}",
            *(
                f"{_of(heads, index, 'keys'):4.0f}  {_of(heads, index, 'total_variation'):.2f} "
                f"{_of(heads, index, 'top_keys'):6.0%}"
                for index in (2, 3)
            ),
        )
    return table


def _lost(report: ExplainReport) -> Table | tuple[str, str]:
    lossy = [site for site in report.sites if any(head.lost for head in report.of(site))]
    name = f"{report.method['method']} at budget {report.method['budget']:g}"
    if not lossy:
        return f"{name} leaves these calls exact: nothing is lost", ""
    table = Table(title=escape(f"What {name} loses"))
    table.add_column("#", justify="right")
    table.add_column("site", overflow="fold")
    for column in ("weights", "effective part", "unseen by the output", "output error"):
        table.add_column(column, justify="right")
    for number, site in enumerate(report.sites):
        heads = [head for head in report.of(site) if head.lost is not None]
        if heads:
            lost = [head.lost for head in heads if head.lost is not None]
            count = len(lost)
            table.add_row(
                str(number),
                escape(site.name),
                f"{sum(x.weights_error for x in lost) / count:.3f}",
                f"{sum(x.effective_error for x in lost) / count:.3f}",
                f"{sum(x.unseen for x in lost) / count:.0%}",
                f"{sum(x.output_error for x in lost) / count:.3f}",
            )
    return table


def _of(heads: list[HeadFigures], part: int, figure: str) -> float:
    return mean(heads, lambda head: float(getattr(head.parts[part], figure)))
