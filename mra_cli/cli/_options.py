"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping
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
METHOD_HELP = "A name, like mra, mra2 or smyrf: see README, Methods."
MethodOption = Annotated[str, typer.Option("--method", help=METHOD_HELP)]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, like rank=32."),
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
InputsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="A picture, or a sound (WAV), for models that take those; repeat for more.",
        show_default="made-up ones",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Chooses the windows of the text.")]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME[:LENGTH]",
        help="Also measure at: needles (causal models), ranking (encoders), transcript (speech). "
        "Repeat for more.",
    ),
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Also write one page to look at.")
]
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


def parse_share(text: str | None, option: str) -> float | None:
    """``1%`` or ``0.01`` as a number; None stays None."""
    if text is None:
        return None
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise typer.BadParameter(
            f"expected a share like 1% or 0.01, got {text!r}", param_hint=option
        ) from None
    return number / 100 if text.endswith("%") else number


def parse_seconds(text: str) -> float:
    """``90s``, ``10m``, ``2h`` or plain seconds."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise typer.BadParameter(
            f"expected a time like 90s, 10m or 2h, got {text!r}", param_hint="--time-limit"
        )
    return seconds


def check_outputs(files: Mapping[str, str | None]) -> None:
    """Fail before the work if a file can't be written, or would be written twice.

    Args:
        files: By the option that names them; drawings are those of ``--plot``.
    """
    for option, target in files.items():
        if target == "-" and option != "--json":
            raise typer.BadParameter("only --json goes to stdout; name a file", param_hint=option)
        check_writable(target, option)
    plot = files.get("--plot")
    if plot is not None and Path(plot).suffix.lower() not in (".png", ".svg"):
        raise typer.BadParameter(
            f"expected a name that ends in .png or .svg, got {plot}", param_hint="--plot"
        )
    real = [Path(target).resolve() for target in files.values() if target not in (None, "-")]
    if len(set(real)) < len(real):
        raise typer.BadParameter("each must be a file of its own", param_hint="/".join(files))


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
