"""The only printer: reports as tables on stdout, talk and progress on stderr, JSON where asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mra_cli.cli._colours import COLOURS
from mra_cli.errors import InputError

if TYPE_CHECKING:
    from mra_cli.bench.report import BenchReport
    from mra_cli.compare.report import CompareReport
    from mra_cli.environment import Environment
    from mra_cli.export import Exported
    from mra_cli.figures import Figures
    from mra_cli.loading import Answer
    from mra_cli.plan import Plan
    from mra_cli.progress import Progress as ProgressFunction
    from mra_cli.report import AnalyzeReport
    from mra_cli.search import SearchReport
    from mra_cli.sites import Site
    from mra_cli.verify import VerifyReport

_PIPE_WIDTH = 120


class Output:
    """Where a command's results go.

    Args:
        target: The value of ``--json``: None, a file, or ``-`` for JSON alone on stdout.
    """

    def __init__(self, target: str | None = None) -> None:
        self._target = target
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self._out = Console(width=width, soft_wrap=False, quiet=target == "-")
        self._talk = Console(stderr=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something of unknown length goes on; nothing off a terminal."""
        if not self._talk.is_terminal:
            yield
            return
        with self._talk.status(what):
            yield

    @contextmanager
    def progress(self) -> Iterator[ProgressFunction]:
        """A bar with the time that remains; nothing off a terminal."""
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._talk,
            transient=True,
            disable=not self._talk.is_terminal,
        )
        with bar:
            task = bar.add_task("starting", total=None)
            yield lambda stage, done, total: bar.update(
                task, description=stage, completed=done, total=total
            )

    def compiled(self) -> float | None:
        """Compiles what is compiled once per machine, and says so if it can't be.

        Returns:
            Seconds it took, 0.0 if it was done before; None: plain torch will run.
        """
        from mra_cli.environment import compile_kernels
        from mra_kernels import implementations

        with self.working("compiling kernels, once on this machine"):
            seconds = compile_kernels()
        if seconds is None:
            reason = implementations()["native"]
            self._talk.print(escape(f"Slow, in plain torch: {reason}."), style="yellow")
        return seconds

    def sites(self, model: str, model_class: str, sites: list[Site]) -> None:
        """The table of `check`."""
        table = Table(title=escape(f"Attention sites of {model} ({model_class})"))
        for name in ("#", "site", "kind", "heads", "head dim", "window", "extras", "verdict"):
            table.add_column(name, justify="right" if name in ("#", "window") else "left")
        for number, site in enumerate(sites):
            verdict = f"[{COLOURS.get(site.verdict, 'dim')}]{site.verdict}[/]"
            table.add_row(
                str(number),
                escape(site.name),
                site.kind,
                _pair(site.heads, site.kv_heads, "q, {} kv"),
                _pair(site.head_dim, site.value_dim, "qk, {} v"),
                str(site.window or "-"),
                escape(", ".join(site.extras) or "-"),
                verdict + (f": {escape(site.reason)}" if site.reason else ""),
            )
        self._out.print(table)
        count = sum(site.verdict == "patch" for site in sites)
        self._out.print(
            f"{count} of {len(sites)} sites can be approximated. "
            "Kinds: NS and CS noncausal and causal self-attention, NC cross-attention, "
            "CC cross-attention of a causal decoder.",
            style="dim",
        )
        self._write(json.dumps({"model": model, "sites": [asdict(s) for s in sites]}, indent=2))

    def analysis(self, report: AnalyzeReport, *, html: str | None) -> None:
        """The tables and verdicts of `analyze`."""
        from mra_cli.cli import _analysis_tables as tables

        for line, style in tables.heading(report):
            self._out.print(escape(line), style=style)
        for table in tables.tables(report):
            self._out.print(table)
        for figures in report.by_budget:
            colour = COLOURS[figures.verdict]
            self._out.print(
                f"[bold {colour}]Budget {figures.budget:g}.[/] {escape(figures.summary)}"
            )
        memory = report.peak_process_bytes / 2**30
        self._out.print(
            f"Took {report.seconds:.1f} s after loading; at most {memory:.2f} GiB of memory.",
            style="dim",
        )
        if html is not None:
            from mra_cli.pages import analyze_page

            self._save(html, analyze_page(report))
        self._write(report.to_json())

    def search(
        self, report: SearchReport, *, plan: str, plot: str | None, html: str | None
    ) -> None:
        """The tables and the answer of `search`; the plan goes to a file if there is one."""
        from mra_cli.cli import _search_tables as tables

        for line, style in tables.heading(report):
            self._out.print(escape(line), style=style)
        for table in tables.tables(report):
            self._out.print(table)
        colour = COLOURS["no" if report.plan is None else "yes"]
        self._out.print(escape(report.answer), style=f"bold {colour}")
        for line in tables.remarks(report):
            self._out.print(escape(line))
        self._out.print(f"Took {report.seconds:.1f} s after loading.", style="dim")
        made = report.made_plan()
        if made is not None:
            self._save(plan, made.to_json() + "\n")
        if plot is not None:
            from mra_cli.search.plots import draw

            self._save(plot, draw(report, Path(plot).suffix.removeprefix(".").lower()))
        if html is not None:
            from mra_cli.pages import search_page

            self._save(html, search_page(report))
        self._write(report.to_json())

    def show(self, blocks: Iterable[Table | tuple[str, str]], text: str) -> None:
        """A report: tables and lines with their style on stdout, its JSON where asked."""
        for block in blocks:
            if isinstance(block, Table):
                self._out.print(block)
            else:
                self._out.print(escape(block[0]), style=block[1])
        self._write(text)

    def bench(self, report: BenchReport, *, csv: str | None, plot: str | None) -> None:
        """The tables and remarks of `bench`; CSV and drawing go to files."""
        from mra_cli.cli import _bench_tables as tables

        for line, style in tables.heading(report):
            self._out.print(escape(line), style=style)
        for table in tables.tables(report):
            self._out.print(table)
        for note in report.notes:
            self._out.print(escape(note), style="dim")
        if report.failed:
            self._out.print(tables.failures(report), style="bold red")
        self._out.print(f"Took {report.seconds:.1f} s.", style="dim")
        if csv is not None:
            self._save(csv, report.to_csv() + "\n")
        if plot is not None:
            from mra_cli.bench.plots import draw

            self._save(plot, draw(report, Path(plot).suffix.removeprefix(".").lower()))
        self._write(report.to_json())

    def comparison(self, report: CompareReport, *, plot: str | None) -> None:
        """The tables of `compare`; the drawing goes to a file."""
        from mra_cli.cli import _compare_tables as tables

        for model in report.models:
            for line, style in tables.heading(model):
                self._out.print(escape(line), style=style)
            for table in tables.tables(model):
                self._out.print(table)
        for table in tables.agreement(report):
            self._out.print(table)
        self._out.print(f"Took {report.seconds:.1f} s after loading.", style="dim")
        if plot is not None:
            from mra_cli.compare.plots import draw

            self._save(plot, draw(report, Path(plot).suffix.removeprefix(".").lower()))
        self._write(report.to_json())

    def bench_plan(self, plan: dict[str, Any]) -> None:
        """What `bench` would run, and what it refuses."""
        from mra_cli.cli import _bench_tables as tables

        self._out.print(escape(plan["subject"]), style="bold")
        self._out.print(tables.plan(plan["runs"]))
        self._write(json.dumps(plan, indent=2))

    def environment(self, environment: Environment) -> None:
        """A block of text to paste: plain, for it goes into plain places."""
        lines = environment.lines()
        width = max(len(label) for label, _ in lines)
        for label, value in lines:
            self._out.print(
                f"{label:{width}}  {value}", markup=False, highlight=False, soft_wrap=True
            )
        self._write(json.dumps(environment.to_dict(), indent=2))

    def plan(self, model: str, plan: Plan) -> None:
        """What `patch --dry-run` would do."""
        self._out.print(_plan_table(f"Plan for {model}", plan, None))
        self._write(plan.to_json())

    def patched(self, done: Exported, plan: Plan, figures: Figures | None, reason: str) -> None:
        """What `patch` did."""
        self._out.print(_plan_table(f"Patched: {done.path}", plan, figures))
        if figures is None:
            self._out.print(escape(f"Not measured: {reason}."))
        else:
            from mra_cli.card import damage_words

            self._out.print(escape(f"All together: {', '.join(damage_words(figures.damage))}."))
        left = f"; left out {', '.join(done.left_out)}" if done.left_out else ""
        self._out.print(
            escape(
                f"{len(done.linked)} files linked, {len(done.copied)} copied in "
                f"{done.seconds:.1f} s{left}."
            ),
            style="dim",
        )
        self._out.print(
            escape(f'Load it: AutoModel.from_pretrained("{done.path}", trust_remote_code=True)')
        )
        report = {
            **asdict(done),
            "path": str(done.path),
            "plan": plan.to_dict(),
            "figures": None if figures is None else figures.to_dict(),
        }
        self._write(json.dumps(report, indent=2))

    def verified(self, report: VerifyReport) -> None:
        """The checks of `verify`."""
        table = Table(title=escape(f"Checks of {report.path}"))
        for name in ("check", "result", "found"):
            table.add_column(name, overflow="fold")
        results = {True: "[green]ok[/]", False: "[red]failed[/]", None: "[yellow]unknown[/]"}
        for check in report.checks:
            table.add_row(escape(check.name), results[check.passed], escape(check.detail))
        self._out.print(table)
        self._write(report.to_json())

    def answer(self, answer: Answer) -> None:
        """The text or the embedding of `run` on stdout, how it came about on stderr."""
        if answer.text is not None:
            self._out.print(escape(answer.text), soft_wrap=True)
        elif answer.embedding is not None:
            shown = " ".join(f"{x:.4f}" for x in answer.embedding)
            self._out.print(shown, soft_wrap=True)
        self._talk.print(
            f"{answer.tokens} tokens of prompt, {answer.seconds:.1f} s; approximated "
            f"{answer.approximated} of {answer.calls} attention calls at the plan's sites "
            "(short ones stay exact)",
            style="dim",
        )
        self._write(json.dumps(asdict(answer), indent=2))

    def _write(self, text: str) -> None:
        if self._target is None:
            return
        if self._target == "-":
            sys.stdout.write(text + "\n")
            return
        self._save(self._target, text + "\n")

    def _save(self, target: str, content: str | bytes) -> None:
        """All of it or nothing; through links, and into pipes and devices."""
        path = Path(target).resolve()
        whole = path.is_file() or not path.exists()  # not a pipe or a device
        part = path.with_name(f".{path.name}.{os.getpid()}.part") if whole else path
        try:
            if isinstance(content, bytes):
                part.write_bytes(content)
            else:
                part.write_text(content, encoding="utf-8")
            if whole:
                part.replace(path)
        except OSError as error:
            raise InputError(f"can't write {path}: {error.strerror}") from error
        finally:
            if whole:
                part.unlink(missing_ok=True)
        self._talk.print(escape(f"wrote {path}"), style="dim")


def _plan_table(title: str, plan: Plan, figures: Figures | None) -> Table:
    table = Table(title=escape(title))
    for name in ("#", "site", "method", "budget", "exact below", "density", "error"):
        table.add_column(name, justify="left" if name in ("site", "method") else "right")
    found = {} if figures is None else {site.site: site for site in figures.sites}
    for number, (name, site) in enumerate(plan.sites.items()):
        figure = found.get(name)
        table.add_row(
            str(number),
            escape(name),
            site.method.name,
            f"{site.method.budget:g}",
            str(site.min_length or "-"),
            "" if figure is None else f"{figure.density:.3f}",
            "" if figure is None else f"{figure.error:.3f}",
        )
    return table


def _pair(first: int, second: int, other: str) -> str:
    return str(first) if first == second else f"{first} {other.format(second)}"
