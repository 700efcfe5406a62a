"""`mra-cli run`: feed a patched checkpoint a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from mra_cli.cli._options import DeviceOption, JsonOption, PatchedArgument, check_writable


def run(
    directory: PatchedArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text; - to read it from stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate, at most.")
    ] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    device: DeviceOption = "cpu",
    json: JsonOption = None,
) -> None:
    """Run DIR, patched, on PROMPT: text from models that generate, an embedding from others."""
    check_writable(json)
    from mra_cli.cli._output import Output
    from mra_cli.loading import run as answer

    out = Output(json)
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    with out.working("running"):
        result = answer(directory, prompt, max_new_tokens=max_new_tokens, chat=chat, device=device)
    out.answer(result)
