"""`mra-cli calibrate`: fit a method to a checkpoint's own queries, keys and values."""

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
    parse_settings,
)


def calibrate(
    model: ModelArgument,
    method: Annotated[str, typer.Option("--method", help="sparsefinder, tff, linformer or sbm.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The calibration: FILE and FILE.json.")
    ],
    settings: SettingsOption = None,
    seq_len: SeqLenOption = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=2, help="Windows of the text; a quarter is held out."),
    ] = 4,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Your own text, UTF-8.", show_default="Python's help texts"),
    ] = None,
    layers: LayersOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Fit a method to MODEL; an interrupted run goes on where it was."""
    chosen = parse_settings(settings or [])
    check_writable(json)
    check_writable(str(out), "--out")
    check_writable(f"{out}.json", "--out")
    from mra_cli import inputs
    from mra_cli.calibrate.calibrate import calibrate as run
    from mra_cli.calibrate.calibrate import make_fit
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli import _calibrate_tables as tables
    from mra_cli.cli._output import Output

    fit = make_fit(method, dict(chosen))
    content = inputs.read_text(text) if text is not None else None
    screen = Output(json)
    with screen.working("loading"):
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
    with screen.progress() as progress:
        done = run(
            checkpoint, windows, fit, out.resolve(), layers=layers, seed=seed, progress=progress
        )
    screen.show(tables.blocks(done, model), done.to_json())
