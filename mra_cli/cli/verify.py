"""`mra-cli verify`: is a patched checkpoint what it says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import JsonOption, PatchedArgument, TrustOption, check_writable


def verify(
    directory: PatchedArgument,
    min_recovery: Annotated[
        float | None,
        typer.Option(
            "--min-recovery",
            help="Fail if less of the exact model is left, like 0.98.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="What the card's figures were measured on.",
            show_default="Python's help texts",
        ),
    ] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check DIR's files, reload it in a fresh process, measure it again; exit code 1: failed."""
    check_writable(json)
    from mra_cli.cli._output import Output
    from mra_cli.errors import VerifyError
    from mra_cli.verify import verify as run

    out = Output(json)
    with out.working("verifying"):
        report = run(
            Path(directory),
            min_recovery=min_recovery,
            text=text,
            trust_remote_code=trust_remote_code,
        )
    out.verified(report)
    if report.failed:
        first = report.failed[0]
        raise VerifyError(
            f"{len(report.failed)} of {len(report.checks)} checks failed; "
            f"{first.name}: {first.detail}"
        )
