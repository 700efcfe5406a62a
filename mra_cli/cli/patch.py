"""`mra-cli patch`: write a checkpoint whose attention is approximated, and that just loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import (
    METHOD_HELP,
    JsonOption,
    LayersOption,
    ModelArgument,
    PickleOption,
    SeedOption,
    SeqLenOption,
    SettingsOption,
    TrustOption,
    check_writable,
    parse_budgets,
    parse_settings,
)


def patch(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The directory to make.", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help=METHOD_HELP, show_default="mra")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="Fraction of the scores to compute exactly.", show_default="0.25"
        ),
    ] = None,
    layers: LayersOption = None,
    settings: SettingsOption = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="A plan, or a report of analyze (--budget says which of its budgets).",
            show_default=False,
        ),
    ] = None,
    min_length: Annotated[
        int | None,
        typer.Option(
            "--min-length", min=0, help="Exact over fewer tokens than this.", show_default="0"
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Loading without the plan's code fails: no silent exact."),
    ] = False,
    link: Annotated[
        bool | None,
        typer.Option(
            "--link/--copy",
            help="Hard-link the weights, or copy them.",
            show_default="link where the file system can",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a patched checkpoint that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, write no checkpoint.")
    ] = False,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run the model for the figures of the model card.",
            show_default="if the weights are no more than 4 GiB",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Measure on this, UTF-8.", show_default="Python's help texts"),
    ] = None,
    seq_len: SeqLenOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of the text.")] = 2,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Write MODEL with approximated attention to DIR, which transformers then loads as it is."""
    if out is None and not dry_run:
        raise typer.BadParameter("say where to write, or pass --dry-run", param_hint="--out")
    if plan is not None and (method or layers or settings):
        raise typer.BadParameter(
            "the plan says it all; leave out --method, --layers and --set", param_hint="--plan"
        )
    budgets = parse_budgets(budget) if budget is not None else None
    if budgets is not None and len(budgets) > 1:
        raise typer.BadParameter(f"expected one number, got {budget}", param_hint="--budget")
    chosen = parse_settings(settings or [])
    check_writable(json)
    from mra_cli.cli._output import Output
    from mra_cli.export import check_apart, export
    from mra_cli.files import locate
    from mra_cli.inputs import read_text
    from mra_cli.methods import make_method
    from mra_cli.prepare import figures_of, prepare
    from mra_cli.report import read_plan
    from mra_cli.staging import check_target

    operator = make_method(method or "mra", budgets[0] if budgets else 0.25, dict(chosen))
    content = None if text is None else read_text(text)
    wanted = None if plan is None else read_plan(plan, budgets[0] if budgets else None)
    source = locate(model)
    target = None
    if out is not None:
        target = check_target(out, force=force)
        if source is not None:
            check_apart(source, target)
    out_ = Output(json)
    with out_.working("reading the model"):
        prepared = prepare(
            model,
            method=operator,
            layers=layers,
            plan=wanted,
            min_length=min_length,
            measure=bool(measure),
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    if dry_run:
        out_.plan(model, prepared.plan)
        return
    assert target is not None
    with out_.working("measuring"):
        figures, reason = figures_of(
            prepared,
            measure=measure,
            text=content,
            text_name=None if text is None else str(text),
            seq_len=seq_len,
            samples=samples,
            seed=seed,
        )
    with out_.working("writing"):
        done = export(
            prepared,
            target,
            figures,
            strict=strict,
            mode="auto" if link is None else "link" if link else "copy",
            force=force,
        )
    out_.patched(done, prepared.plan, figures, reason)
