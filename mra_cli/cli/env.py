"""`mra-cli env`: what a bug report needs to say about the machine."""

from __future__ import annotations

from mra_cli.cli._options import JsonOption, check_writable


def env(json: JsonOption = None) -> None:
    """Print what an issue has to say of the machine: versions, processor, compiler, kernels."""
    check_writable(json)
    from mra_cli.cli._output import Output
    from mra_cli.environment import Environment

    out = Output(json)
    with out.working("looking around"):
        environment = Environment.collect()
    out.environment(environment)
