"""`mra-cli analyze`: which layers can be approximated, at which error, at what harm."""

from __future__ import annotations

from typing import Annotated

import typer

from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
    HtmlOption,
    InputsOption,
    JsonOption,
    LayersOption,
    MethodOption,
    ModelArgument,
    PickleOption,
    SeedOption,
    SeqLenOption,
    SettingsOption,
    TaskOption,
    TextsOption,
    TrustOption,
    check_outputs,
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
    text: TextsOption = None,
    inputs: InputsOption = None,
    task: TaskOption = None,
    forecast: Annotated[
        bool,
        typer.Option(
            "--forecast",
            help="Run each layer alone, too, and foretell what plans of mixed budgets do.",
        ),
    ] = False,
    layers: LayersOption = None,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    html: HtmlOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Measure, layer by layer and for the whole MODEL, what approximating its attention does."""
    budgets = parse_budgets(budget)
    chosen = parse_settings(settings or [])
    check_outputs({"--json": json, "--html": html})
    from mra_cli.analyze import analyze as run
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli._output import Output
    from mra_cli.evaluate import make_task
    from mra_cli.media import media_samples
    from mra_cli.methods import make_method
    from mra_cli.texts import read_texts, samples_of

    if inputs and (text or seq_len):
        raise typer.BadParameter("give files, or --text and --seq-len", param_hint="--input")
    operator = make_method(method, budgets[0], dict(chosen))
    texts = read_texts(text or [])
    out = Output(json)
    with out.working("loading"):
        checkpoint = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    if inputs:
        windows = media_samples(checkpoint, inputs)
    else:
        windows = samples_of(
            checkpoint, texts if text else None, seq_len=seq_len, count=samples, seed=seed
        )
    content = texts[0].content
    tasks = [
        make_task(spec, checkpoint, windows, content, count=samples, seed=seed)
        for spec in task or []
    ]
    out.compiled()
    with out.progress() as progress:
        report = run(
            checkpoint,
            windows,
            operator,
            budgets,
            layers=layers,
            tasks=tasks,
            forecast=forecast,
            seed=seed,
            progress=progress,
        )
    out.analysis(report, html=html)
