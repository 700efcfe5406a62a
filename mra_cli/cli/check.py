"""`mra-cli check`: which attention sites a model has, and what can be done with each."""

from __future__ import annotations

from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PickleOption,
    TrustOption,
    check_writable,
)


def check(
    model: ModelArgument = "demo:minilm",
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """List the attention sites of MODEL, and whether each can be approximated."""
    check_writable(json)
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli._output import Output
    from mra_cli.inputs import dry_run
    from mra_cli.sites import find_sites

    out = Output(json)
    with out.working("loading"):
        checkpoint = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        sites = find_sites(checkpoint.model, dry_run(checkpoint))
    out.sites(model, type(checkpoint.model).__name__, sites)
