"""The tables of `fold`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from mra_cli.card import damage_words
from mra_cli.fold.report import FoldReport, IdentityFigures


def blocks(report: FoldReport) -> Iterator[Table | tuple[str, str]]:
    """What to print, top to bottom: tables, and lines with their style."""
    origin = report.provenance
    yield f"{origin.model} ({origin.model_class}, {origin.dtype})", "bold"
    yield f"{report.parameters / 1e6:.1f} million parameters; checked on {origin.inputs}", "dim"
    if report.variant is not None:
        yield from _variant(report)
        return
    yield _identities(report)
    yield (
        "Parameters and cached numbers are those concerned, per site, before and after; a weight "
        "is also one multiply-add per token. Moved: relative change of attention's output, in "
        "float64.",
        "dim",
    )
    yield from _cached_inputs(report)
    zeros = sum(figures.before.parameters for figures in report.folded if figures.before)
    if not report.folded:
        yield "Nothing can be folded into a checkpoint of this class.", ""
    elif report.written is None:
        yield f"{zeros} bias parameters can be folded away; write the model with --out DIR.", ""
    else:
        assert report.damage is not None
        yield (
            f"Wrote {report.written}: {zeros} bias parameters are zero now (the class keeps their "
            f"place). Its output moved by {report.parity:.1e} in {origin.dtype}; "
            f"{', '.join(damage_words(report.damage))}.",
            "",
        )


def _identities(report: FoldReport) -> Table:
    table = Table(title="Exact identities")
    table.add_column("identity", no_wrap=True)
    table.add_column("sites")
    for name in ("parameters", "per cached key", "cached", "moved"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    numbers = {name: n for n, name in enumerate(dict.fromkeys(f.site for f in report.identities))}
    alike: dict[IdentityFigures, list[IdentityFigures]] = {}
    for figures in report.identities:
        alike.setdefault(replace(figures, site="", gap=None), []).append(figures)
    for figures, group in sorted(alike.items(), key=lambda item: item[0].identity):
        gaps = [one.gap for one in group if one.gap is not None]
        before, after = figures.before, figures.after
        known = before is not None and after is not None
        verdict = "[green]folds[/]" if figures.reason is None else escape(figures.reason)
        table.add_row(
            figures.identity,
            _ranges([numbers[one.site] for one in group]),
            *(
                f"{getattr(before, name)} → {getattr(after, name)}" if known else ""
                for name in ("parameters", "per_key", "cached")
            ),
            f"{max(gaps):.0e}" if gaps else "",
            verdict,
        )
    return table


def _cached_inputs(report: FoldReport) -> Iterator[tuple[str, str]]:
    """What both products would do to decoding, where both are to be had."""
    products = [f for f in report.identities if "x" in f.identity.split()]
    by_site: dict[str, list[IdentityFigures]] = {}
    for figures in products:
        if figures.before is not None and figures.after is not None:
            by_site.setdefault(figures.site, []).append(figures)
    both = [group for group in by_site.values() if len(group) == 2]
    if not both:
        return
    before = sum(f.before.cached for f in both[0] if f.before)
    after = both[0][0].after
    work = [sum(getattr(f, side).per_key for f in both[0]) for side in ("before", "after")]
    assert after is not None
    verb = "shrink" if after.cached < before else "grow"
    yield (
        f"Both products, decoding from a cache of the layer's inputs: the cache would {verb} from "
        f"{before} to {after.cached} numbers per token, the work per cached key go from {work[0]} "
        f"to {work[1]} multiply-adds. No class of transformers decodes so; nothing is written.",
        "dim",
    )


def _variant(report: FoldReport) -> Iterator[Table | tuple[str, str]]:
    table = Table(title=f"{report.variant} attention, fitted in closed form: a start for training")
    table.add_column("#", justify="right")
    table.add_column("site", overflow="fold")
    for name in ("parameters", "output error", "of the mean output"):
        table.add_column(name, justify="right")
    for number, site in enumerate(report.variant_sites):
        table.add_row(
            str(number),
            escape(site.site),
            f"{site.parameters_before} → {site.parameters_after}",
            f"{site.gap:.3f}",
            f"{site.constant_gap:.3f}",
        )
    yield table
    assert report.damage is not None
    yield (
        f"Not equivalent: {', '.join(damage_words(report.damage))}. Output errors are on text that "
        "was not fitted on, each site fed exactly; knowing nothing gives the last column.",
        "yellow",
    )
    if report.written is not None:
        frozen = "values" if report.variant == "optimised" else "keys and values"
        yield (
            f"Wrote {report.written}, in the same class: its projections of {frozen} are the "
            "identity, to be frozen, or taken out of the class, when you train it."
            + (
                f" The mixing of positions, for {report.provenance.seq_len} tokens, lies beside "
                "it in super_mixing.safetensors."
                if report.variant == "super"
                else ""
            ),
            "",
        )


def _ranges(numbers: list[int]) -> str:
    """``0-5``, or ``0,2,5``."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
