"""`mra-cli explain`: which part of attention its output needs, and what a method loses of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
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


def explain(
    model: ModelArgument = "demo:minilm",
    method: Annotated[str, typer.Option("--method", help="Whose loss to tell.")] = "mra",
    budget: Annotated[
        str, typer.Option("--budget", help="Fraction of the scores it computes exactly.")
    ] = "0.25",
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Rows looked at, per head and sample.")
    ] = 4,
    seq_len: SeqLenOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of the text.")] = 2,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Your own text, UTF-8.", show_default="Python's help texts"),
    ] = None,
    layers: LayersOption = None,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Take MODEL's attention apart: the part its output needs, by four constructions."""
    budgets = parse_budgets(budget)
    if len(budgets) > 1:
        raise typer.BadParameter(f"expected one number, got {budget}", param_hint="--budget")
    chosen = parse_settings(settings or [])
    check_writable(json)
    from mra_cli import inputs
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli import _explain_tables as tables
    from mra_cli.cli._output import Output
    from mra_cli.explain.measure import explain as run
    from mra_cli.explain.parts import check_solver
    from mra_cli.methods import make_method

    check_solver()
    operator = make_method(method, budgets[0], dict(chosen))
    content = inputs.read_text(text) if text is not None else None
    out = Output(json)
    with out.working("loading"):
        checkpoint = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    windows = inputs.make_samples(
        checkpoint,
        text=content,
        text_name=str(text) if text is not None else inputs.DEFAULT_TEXT_NAME,
        seq_len=seq_len,
        count=samples,
        seed=seed,
    )
    out.compiled()
    with out.progress() as progress:
        report = run(
            checkpoint, windows, operator, rows=rows, layers=layers, seed=seed, progress=progress
        )
    out.show(tables.blocks(report), report.to_json())
    if report.failed:
        raise typer.Exit(1)
