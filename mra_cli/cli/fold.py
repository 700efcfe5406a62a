"""`mra-cli fold`: attention's exact identities, and leaner variants as a start for training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import (
    DtypeOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    PickleOption,
    SeedOption,
    SeqLenOption,
    TrustOption,
    check_writable,
)


def fold(
    model: ModelArgument = "demo:minilm",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Write the folded model here.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="optimised, efficient or super: not equivalent, a start for training.",
            show_default="exact identities",
        ),
    ] = None,
    layers: LayersOption = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Your own text, UTF-8.", show_default="Python's help texts"),
    ] = None,
    seq_len: SeqLenOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Windows of the text; with --as, the last one is held out.",
            show_default="2; 8 with --as",
        ),
    ] = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Say which of MODEL's attention weights can be folded exactly, and write what loads as it is.

    Products of matrices that grow the model are refused.
    """
    if kind not in (None, "optimised", "efficient", "super"):
        raise typer.BadParameter(
            f"expected optimised, efficient or super, got {kind!r}", param_hint="--as"
        )
    check_writable(json)
    from mra_cli import inputs
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli import _fold_tables as tables
    from mra_cli.cli._output import Output
    from mra_cli.export import check_apart
    from mra_cli.files import locate
    from mra_cli.fold import fold as folding
    from mra_cli.staging import check_target

    content = inputs.read_text(text) if text is not None else None
    target, source = None, locate(model)
    if out is not None:
        target = check_target(out, force=False)
        if source is not None:
            check_apart(source, target)
    screen = Output(json)
    with screen.working("loading"):
        checkpoint = load_checkpoint(
            model, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
    windows = inputs.make_samples(
        checkpoint,
        text=content,
        text_name=str(text) if text is not None else inputs.DEFAULT_TEXT_NAME,
        seq_len=seq_len,
        count=samples or (2 if kind is None else 8),
        seed=seed,
    )
    with screen.progress() as progress:
        run = folding.fold if kind is None else partial(folding.start_variant, kind=kind)
        report = run(
            checkpoint, windows, layers=layers, seed=seed, target=target, progress=progress
        )
    screen.show(tables.blocks(report), report.to_json())
