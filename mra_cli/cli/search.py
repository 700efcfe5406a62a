"""`mra-cli search`: the cheapest plan that keeps what has to be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mra_cli.cli._options import (
    DeviceOption,
    DtypeOption,
    HtmlOption,
    JsonOption,
    LayersOption,
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
    parse_seconds,
    parse_settings,
    parse_share,
)


def search(
    model: ModelArgument = "demo:minilm",
    max_loss_increase: Annotated[
        str | None,
        typer.Option(help="Of the exact loss: 1% of 2.3 nats is 2.3 % of perplexity."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Divergence, nats per token.")] = None,
    min_agreement: Annotated[
        str | None, typer.Option(help="Share of most likely classes kept, like 99%.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Mean cosine of embeddings, like 0.995.")
    ] = None,
    max_output_change: Annotated[
        str | None, typer.Option(help="Relative change of other heads' output, like 1%.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the scores computed exactly, at most.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the plan is written.")
    ] = Path("plan.json"),
    method: Annotated[str, typer.Option("--method", help="The method.")] = "mra",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Fractions of the scores to try at each site.",
            show_default="0.05,0.1,0.15,0.2,0.3,0.4,0.6, and exact",
        ),
    ] = None,
    save: Annotated[
        str, typer.Option("--save", help="What to make small: density or latency.")
    ] = "density",
    per_site: Annotated[
        bool,
        typer.Option("--per-site", help="One budget for all heads of a site."),
    ] = False,
    seq_len: SeqLenOption = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Windows of each text, on either side.")
    ] = 2,
    text: TextsOption = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            help="Text to verify on; repeat for more.",
            show_default="the second half of each --text; the search sees the first",
        ),
    ] = None,
    task: TaskOption = None,
    layers: LayersOption = None,
    settings: SettingsOption = None,
    time_limit: Annotated[
        str | None,
        typer.Option("--time-limit", metavar="TIME", help="Like 90s, 10m or 2h."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FILE",
            help="Where measurements are kept; the same search goes on from there.",
            show_default="OUT with .state behind it",
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE", help="Draw the frontier: .png or .svg."),
    ] = None,
    html: HtmlOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Find, site by site, the cheapest settings that keep a target, and write them as a plan.

    Name one target or several. The plan is verified on text the search has not seen; exit code 1
    and no plan if none holds. `mra-cli patch MODEL --plan plan.json` takes it from there.
    """
    targets = {
        "max-loss-increase": parse_share(max_loss_increase, "--max-loss-increase"),
        "max-kl": max_kl,
        "min-agreement": parse_share(min_agreement, "--min-agreement"),
        "min-cosine": min_cosine,
        "max-output-change": parse_share(max_output_change, "--max-output-change"),
        "density": density,
    }
    named = {name: value for name, value in targets.items() if value is not None}
    if not named:
        raise typer.BadParameter(
            "name what has to hold: " + ", ".join(f"--{name}" for name in targets),
            param_hint="MODEL",
        )
    for name, value in named.items():
        if not (0.0 < value < 1.0 if name in _SHARES else value > 0.0):
            expected = "between 0 and 1" if name in _SHARES else "over 0"
            raise typer.BadParameter(f"must be {expected}, got {value:g}", param_hint=f"--{name}")
    if save not in ("density", "latency"):
        raise typer.BadParameter(f"density or latency, got {save!r}", param_hint="--save")
    limit = parse_seconds(time_limit) if time_limit is not None else None
    budgets = tuple(b for b in parse_budgets(budget) if b < 1.0) if budget is not None else None
    if budgets == ():
        raise typer.BadParameter(
            "one must be under 1; exact is tried anyway", param_hint="--budget"
        )
    chosen = parse_settings(settings or [])
    state = state or out.with_name(f"{out.name}.state")
    files = {"--json": json, "--plot": plot, "--html": html}
    check_outputs({"--out": str(out), "--state": str(state), **files})
    from mra_cli.bench.plots import check_can_draw
    from mra_cli.checkpoint import load_checkpoint
    from mra_cli.cli._output import Output
    from mra_cli.errors import SearchError
    from mra_cli.evaluate import make_task
    from mra_cli.methods import make_method
    from mra_cli.search import BUDGETS, SearchSetup, Target
    from mra_cli.search import search as run
    from mra_cli.texts import read_texts, split_samples

    if plot is not None:
        check_can_draw()
    setup = SearchSetup(
        make_method(method, 0.25, dict(chosen)),
        tuple(Target(name, value) for name, value in named.items()),
        budgets=budgets or BUDGETS,
        saves=save,
        layers=layers,
        per_site=per_site,
        time_limit_s=limit,
        seed=seed,
    )
    texts = read_texts(text or [])
    others = read_texts(held_out) if held_out else None
    output = Output(json)
    with output.working("loading"):
        checkpoint = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    sides = split_samples(
        checkpoint,
        texts,
        others,
        given=bool(text or held_out),
        seq_len=seq_len,
        count=samples,
        seed=seed,
    )
    content = (others or texts)[0].halves()[1].content
    tasks = [
        make_task(spec, checkpoint, sides[1], content, count=samples, seed=seed)
        for spec in task or []
    ]
    output.compiled()
    with output.progress() as progress:
        try:
            report = run(checkpoint, *sides, setup, tasks=tasks, state=state, progress=progress)
        except KeyboardInterrupt:
            raise SearchError(f"interrupted; the same command goes on from {state}") from None
    output.search(report, plan=str(out), plot=plot, html=html)
    if report.plan is None:
        raise SearchError(report.answer + f" What was measured is in {state}.")


_SHARES = ("min-agreement", "min-cosine", "density")
