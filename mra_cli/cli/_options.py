"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, directory, .gguf file, demo:minilm or demo:smollm2.",
        show_default="demo:minilm",
    ),
]
PatchedArgument = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A patched checkpoint.", show_default=False),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default="the file's"),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda, ...")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights, which can carry code too.")
]
SeqLenOption = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        min=1,
        help="Tokens per sample.",
        show_default="what the model takes, at most 512 for encoders, 1024 for causal models",
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Site numbers as in 'check' (0,2-4), or parts of names.",
        show_default="all that can be patched",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting of the method, like coarse=per_query."
    ),
]
TextsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Your own text, UTF-8, or the built-in help or code; repeat for figures by text.",
        show_default="help: Python's help texts",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Chooses the windows of the text.")]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write JSON; - for JSON alone on stdout."),
]


def parse_budgets(text: str) -> list[float]:
    """``0.1,0.25`` as numbers in (0, 1], sorted, without repeats."""
    try:
        budgets = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers like 0.1,0.25,0.5, got {text!r}", param_hint="--budget"
        ) from None
    if not all(0.0 < budget <= 1.0 for budget in budgets):
        raise typer.BadParameter(
            f"a budget is a fraction in (0, 1], got {text}", param_hint="--budget"
        )
    return budgets


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dictionary."""
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise typer.BadParameter(f"expected KEY=VALUE, got {pair!r}", param_hint="--set")
        settings[key.strip()] = value.strip()
    return settings


def check_writable(target: str | None, option: str = "--json") -> None:
    """Fail before the work, not after it, if ``target`` of ``option`` can't be written."""
    if target is None or target == "-":
        return
    path = Path(target).resolve()  # through a link, or the trial below would remove the link
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise typer.BadParameter(
            f"can't write {target}: {error.strerror}", param_hint=option
        ) from None
