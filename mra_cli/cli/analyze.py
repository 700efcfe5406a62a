"""`mra-cli analyze`: which layers can be approximated, at which error, at what harm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    MethodOption,
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


def analyze(
    model: ModelArgument = "demo:minilm",
    method: MethodOption = "mra",
    budget: Annotated[
        str, typer.Option("--budget", help="Fractions of the scores to compute exactly.")
    ] = "0.1,0.25,0.5",
    seq_len: SeqLenOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of the text.")] = 4,
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
    """Measure, layer by layer and for the whole MODEL, what approximating its attention does."""
    budgets = parse_budgets(budget)
    chosen = parse_settings(settings or [])
    check_writable(json)
    from mra_cli import inputs
    from mra_cli.analyze import analyze as run
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli._output import Output
    from mra_cli.methods import make_method

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
            checkpoint, windows, operator, budgets, layers=layers, seed=seed, progress=progress
        )
    out.analysis(report)
