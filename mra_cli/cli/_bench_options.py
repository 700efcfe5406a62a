"""The options of `bench`, and what goes with what."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_CALLS, _RANDOM, _MODELS = "Single calls", "Single calls, random inputs", "With a model"


def _count(name: str, default: str, panel: str | None = None, text: str | None = None) -> Any:
    shown = default or False
    return typer.Option(name, min=1, show_default=shown, help=text, rich_help_panel=panel)


BenchModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Time this whole model, original against patched; without it, single calls.",
        show_default=False,
    ),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        help="Lengths, like 512,1024; of one number, half and double, too.",
        show_default="1024; for a MODEL, what it takes",
    ),
]
MethodsOption = Annotated[str, typer.Option("--method", help="Names, like mra,mra2s; or all.")]
BudgetsOption = Annotated[
    str, typer.Option("--budget", help="Fractions of the scores to compute exactly.")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the methods."),
]
ImplOption = Annotated[
    str, typer.Option("--impl", help="Implementation, as in 'env'; auto: the best for each call.")
]
BenchDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16.", show_default="float32; the file's"
    ),
]
ThreadsOption = Annotated[int | None, _count("--threads", "as many as torch takes")]
PairsOption = Annotated[
    int | None,
    _count(
        "--pairs", "10, or up to 100 of quick calls; 3 of a MODEL", text="Timings per row, at most."
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the inputs.")]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        help="Of NS,CS,NC,CC: (non)causal self- and cross-attention.",
        show_default="NS,CS; with --decode CS",
        rich_help_panel=_RANDOM,
    ),
]
HeadsOption = Annotated[int | None, _count("--heads", "8", _RANDOM)]
KvHeadsOption = Annotated[int | None, _count("--kv-heads", "as --heads", _RANDOM)]
HeadDimOption = Annotated[int | None, _count("--head-dim", "64", _RANDOM)]
BatchOption = Annotated[int | None, _count("--batch", "1", _RANDOM)]
InputsOption = Annotated[
    str,
    typer.Option(
        "--inputs",
        metavar="random|MODEL",
        help="Random numbers, or what reaches a layer of this model.",
        rich_help_panel=_CALLS,
    ),
]
KeysPerRowOption = Annotated[
    int | None,
    _count(
        "--keys-per-row",
        "",
        _CALLS,
        "Instead of --budget: exact scores per query, whatever the length.",
    ),
]
BackwardOption = Annotated[
    bool, typer.Option("--backward", help="Time both passes together.", rich_help_panel=_CALLS)
]
DecodeOption = Annotated[
    bool,
    typer.Option("--decode", help="Time new queries against a full cache.", rich_help_panel=_CALLS),
]
RowsOption = Annotated[
    int | None, _count("--rows", "1", _CALLS, "New queries per step of --decode.")
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Sites as in 'check': to patch, or to take --inputs from (the first).",
        show_default="all; the middle one",
        rich_help_panel=_MODELS,
    ),
]
NewTokensOption = Annotated[
    int | None, _count("--new-tokens", "16", _MODELS, "To decode after the prompt.")
]
CsvOption = Annotated[
    str | None, typer.Option("--csv", metavar="FILE", help="Also write the rows as CSV.")
]
PlotOption = Annotated[
    str | None, typer.Option("--plot", metavar="FILE", help="Also draw; .png or .svg.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would run, and what is refused and why.")
]


def parse_lengths(text: str) -> list[int]:
    """``512,1024`` as numbers, sorted, without repeats; one number brings its half and double."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1:
        raise typer.BadParameter(
            f"expected lengths of at least 1 like 512,1024, got {text!r}", param_hint="--seq-len"
        )
    if len(lengths) == 1 and "," not in text:
        lengths = sorted({max(1, lengths[0] // 2), lengths[0], 2 * lengths[0]})
    return lengths


def refuse(given: dict[str, Any], why: str) -> None:
    """Usage error for the first option that was given a value."""
    for option, value in given.items():
        if value is not None and value is not False:
            raise typer.BadParameter(f"{why}; leave it out", param_hint=option)
