"""The tables of `bench`."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from mra_cli.bench.report import BenchReport, BenchRow, ModelRow
from mra_cli.bench.scaling import BreakEven
from mra_cli.bench.workload import PATTERNS

_TIMED = {
    "forward": "forward pass",
    "forward+backward": "forward and backward pass together",
    "decode": "one step of decoding against a full cache",
    "model": "whole model",
}


def heading(report: BenchReport) -> list[tuple[str, str]]:
    """Lines above the tables, with their style."""
    compiling = (
        ""
        if report.compile_s is None
        else f"; compiled before, in {report.compile_s:.1f} s"
        if report.compile_s
        else "; compiled earlier"
    )
    return [
        (f"{report.subject}, {report.dtype} on {report.device}: {_TIMED[report.timed]}", "bold"),
        (f"{report.inputs}; {report.machine}", "dim"),
        (
            f"exact: torch's scaled_dot_product_attention, same dtype, in turn with each method"
            f"{compiling}",
            "dim",
        ),
    ]


def tables(report: BenchReport) -> list[Table]:
    """One per pattern (or of the model), what was refused, and the trends."""
    found = [
        _attention(report, pattern)
        for pattern in PATTERNS
        if any(row.pattern == pattern for row in report.rows)
    ]
    if report.model_rows:
        found.append(_model(report.model_rows))
    if report.refused:
        found.append(
            plan(
                [
                    {
                        "pattern": r.pattern,
                        "length": r.n_keys,
                        "method": r.method,
                        "budget": r.setting,
                        "refused": r.reason,
                    }
                    for r in report.refused
                ]
            )
        )
    return [*found, _trends(report)]


def plan(runs: list[dict[str, object]]) -> Table:
    """What runs and what does not; entries have pattern, length, method, budget, refused."""
    table = Table(title="Refused" if all(run["refused"] for run in runs) else "Would run")
    for name in ("pattern", "length", "method", "budget", ""):
        table.add_column(name, justify="right" if name in ("length", "budget") else "left")
    for run in runs:
        reason = run["refused"]
        verdict = f"[red]refused[/]: {escape(str(reason))}" if reason else "[green]runs[/]"
        cells = [str(run[key] or "any") for key in ("pattern", "length", "method", "budget")]
        table.add_row(*map(escape, cells), verdict)
    return table


def failures(report: BenchReport) -> str:
    """What failed, and what that means."""
    rows = ", ".join(
        f"{row.pattern} {row.n_keys} {' '.join(row.series)} ({row.impl}: {row.rounding:.1e} > "
        f"{row.rounding_bound:.1e})"
        for row in report.failed
    )
    return escape(
        f"FAILED: off the float64 reference of the same plan by more than rounding: {rows}. "
        "Don't use this; run with --impl reference, and please report it with: mra-cli env"
    )


def _attention(report: BenchReport, pattern: str) -> Table:
    rows = [row for row in report.rows if row.pattern == pattern]
    impls = sorted({row.impl for row in rows})
    title = f"{pattern}: {PATTERNS[pattern]}"
    if report.timed == "decode":
        title += f", {rows[0].n_queries} new against the cache"
    elif pattern[1] == "C":
        title += ", half as many queries as keys"
    heads = min((row.heads_checked for row in rows if row.heads_checked), default=0)
    checked = f"; checked against float64: {heads} or more heads of each row" if heads else ""
    table = Table(title=title, caption=f"computed by: {', '.join(impls)}{checked}")
    names = ["keys", "method", "budget", "density", "error", "exact ms\np50 (p90)"]
    names += ["method ms\np50 (p90)", "speed-up", "of\nideal", "peak MiB\n(exact)", "check"]
    for name in names:
        table.add_column(name, justify="left" if name in ("method", "check") else "right")
    before = rows[0].n_keys
    for row in rows:
        if row.n_keys != before:
            table.add_section()
        before = row.n_keys
        table.add_row(*_cells(row, show_impl=len(impls) > 1))
    return table


def _cells(row: BenchRow, *, show_impl: bool) -> list[str]:
    method, setting = row.series
    check = {"ok": "[green]ok[/]", "not checked": "[dim]not checked[/]"}
    return [
        str(row.n_keys),
        escape(f"{method} ({row.impl})" if show_impl else method),
        setting,
        f"{row.density:.3f}",
        f"{row.error:.3f}",
        f"{_three(row.exact_p50_ms)} ({_three(row.exact_p90_ms)})",
        f"{_three(row.method_p50_ms)} ({_three(row.method_p90_ms)})",
        _speedup(row.speedup),
        f"{100 * row.of_ideal:.0f} %",
        f"{_mib(row.method_bytes)} ({_mib(row.exact_bytes)})",
        check.get(row.status, f"[bold red]{row.status}[/]"),
    ]


def _model(rows: tuple[ModelRow, ...]) -> Table:
    table = Table(title="Whole model, original -> patched")
    generates = any(row.exact_tokens_per_s is not None for row in rows)
    names = ["tokens", "method", "budget", "prefill ms" if generates else "forward ms", "speed-up"]
    names += ["first token ms", "tokens/s"] if generates else []
    for name in (*names, "peak MiB", "what it does"):
        table.add_column(name, justify="left" if name in ("method", "what it does") else "right")
    for row in rows:
        cells = [
            str(row.n_tokens),
            escape(row.method),
            f"{row.budget:g}",
            f"{row.exact_prefill_ms:.0f} -> {row.method_prefill_ms:.0f}",
            _speedup(row.speedup),
        ]
        if generates:
            cells.append(_change(row.exact_first_ms, row.method_first_ms, "{:.0f}"))
            cells.append(_change(row.exact_tokens_per_s, row.method_tokens_per_s, "{:.1f}"))
        exact, mine = (
            None if b is None else b / 2**20 for b in (row.exact_bytes, row.method_bytes)
        )
        table.add_row(*cells, _change(exact, mine, "{:.0f}"), escape(row.harm))
    return table


def _trends(report: BenchReport) -> Table:
    table = Table(title="From which length on it pays, and how cost grows")
    table.add_column("pattern")
    table.add_column("method")
    table.add_column("budget", justify="right")
    for name in ("break-even, fitted", "break-even, measured"):
        table.add_column(name, overflow="fold", ratio=1)
    table.add_column("growth\nexact -> method", justify="right")
    for trend in report.trends:
        exponents = trend.exact_exponent, trend.method_exponent
        growth = " -> ".join("-" if e is None else f"N^{e:.2f}" for e in exponents)
        names = escape(trend.pattern), escape(trend.method), trend.setting
        table.add_row(*names, _length(trend.fitted), _length(trend.measured), growth)
    return table


def _length(found: BreakEven) -> str:
    value = "none" if found.length is None else f"[bold]{found.length:.0f}[/]"
    return value + (f" ({escape(found.note)})" if found.note else "")


def _speedup(ratio: float) -> str:
    colour = "green" if ratio > 1.02 else "red" if ratio < 0.98 else "yellow"
    return f"[{colour}]{ratio:.2f}x[/]"


def _change(before: float | None, after: float | None, form: str) -> str:
    return " -> ".join("-" if x is None else form.format(x) for x in (before, after))


def _mib(size: int) -> str:
    return _three(size / 2**20)


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
