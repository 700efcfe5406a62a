"""`mra-cli compare`: every method on a checkpoint, side by side at equal cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._bench_options import PlotOption
from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    PickleOption,
    SeedOption,
    TrustOption,
    check_outputs,
    parse_budgets,
    parse_settings,
)


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Hub ids, directories, .gguf files, demo:minilm or demo:smollm2.",
            show_default="demo:minilm",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Names, like mra,smyrf; or all. See README, Methods.")
    ] = "all",
    budget: Annotated[
        str, typer.Option("--budget", help="Fractions of exact attention's work to spend.")
    ] = "0.1,0.25,0.5",
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            min=1,
            help="Tokens per sample.",
            show_default="what the model takes, at most 512",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of the text.")] = 2,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Your own text, UTF-8.", show_default="Python's help texts"),
    ] = None,
    layers: LayersOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.KEY=VALUE",
            help="A setting of one method, like smyrf.hashes=8.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    plot: PlotOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Compare approximations of attention in MODEL: error, harm, time and memory at equal cost."""
    budgets, chosen = parse_budgets(budget), parse_settings(settings or [])
    check_outputs({"--json": json, "--plot": plot})
    from mra_cli import inputs
    from mra_cli.bench.plots import check_can_draw
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli._output import Output
    from mra_cli.compare.choice import choose_methods
    from mra_cli.compare.run import compare_models

    if plot is not None:
        check_can_draw()
    wanted = choose_methods(methods, budgets[0], dict(chosen))
    content = inputs.read_text(text) if text is not None else None
    out = Output(json)
    loaded = []
    for name in models or ["demo:minilm"]:
        with out.working(f"loading {name}"):
            checkpoint = load_checkpoint(
                name,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )
        length = seq_len
        if length is None and checkpoint.model.main_input_name == "input_ids":
            length = min(512, inputs.position_limit(checkpoint) or 512)
        windows = inputs.make_samples(
            checkpoint,
            text=content,
            text_name=str(text) if text is not None else inputs.DEFAULT_TEXT_NAME,
            seq_len=length,
            count=samples,
            seed=seed,
        )
        loaded.append((checkpoint, windows))
    out.compiled()
    with out.progress() as progress:
        report = compare_models(
            loaded, wanted, budgets, layers=layers, seed=seed, progress=progress
        )
    out.comparison(report, plot=plot)
