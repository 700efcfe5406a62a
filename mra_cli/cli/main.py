"""Assembles the commands; the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mra_cli import __version__
from mra_cli.cli.analyze import analyze
from mra_cli.cli.bench import bench
from mra_cli.cli.calibrate import calibrate
from mra_cli.cli.check import check
from mra_cli.cli.compare import compare
from mra_cli.cli.env import env
from mra_cli.cli.explain import explain
from mra_cli.cli.fold import fold
from mra_cli.cli.patch import patch
from mra_cli.cli.run import run
from mra_cli.cli.search import search
from mra_cli.cli.verify import verify
from mra_cli.errors import MraError

app = typer.Typer(
    help="Can attention be approximated in this model? Measure it on the checkpoint you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(check)
app.command()(analyze)
app.command()(compare)
app.command()(calibrate)
app.command()(explain)
app.command()(fold)
app.command()(search)
app.command()(bench)
app.command()(env)
app.command()(patch)
app.command()(verify)
app.command()(run)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mra-cli {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; read when they are imported


def main() -> None:
    """Run the command line; exit code 0 for success, 1 for what the user can mend, 2 for usage."""
    try:
        app(prog_name="mra-cli")
    except SystemExit as ended:
        if ended.code == 130:  # typer takes the KeyboardInterrupt for itself, and says nothing
            _fail("interrupted; nothing was written")
        raise
    except MraError as error:
        if _debugging():
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written")
    except Exception as error:
        if _debugging():
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error}; "
            "set MRA_DEBUG=1 for the traceback and please report it"
        )


def _debugging() -> bool:
    return os.environ.get("MRA_DEBUG", "0") not in ("", "0")


def _fail(message: str) -> None:
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(1)
