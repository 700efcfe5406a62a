"""`mra-cli bench`: how fast methods are on this machine, against torch's own exact attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import typer

from mra_cli.cli import _bench_options as options
from mra_cli.cli._options import (
    DeviceOption,
    JsonOption,
    PickleOption,
    TrustOption,
    check_outputs,
    parse_budgets,
    parse_settings,
)

if TYPE_CHECKING:
    from mra_cli.bench.report import BenchReport
    from mra_cli.checkpoint import Checkpoint


def bench(
    model: options.BenchModelArgument = None,
    seq_len: options.LengthsOption = None,
    method: options.MethodsOption = "mra",
    budget: options.BudgetsOption = "0.1,0.25",
    settings: options.SettingsOption = None,
    impl: options.ImplOption = "auto",
    dtype: options.BenchDtypeOption = None,
    device: DeviceOption = "cpu",
    threads: options.ThreadsOption = None,
    pairs: options.PairsOption = None,
    seed: options.SeedOption = 0,
    pattern: options.PatternOption = None,
    heads: options.HeadsOption = None,
    kv_heads: options.KvHeadsOption = None,
    head_dim: options.HeadDimOption = None,
    batch: options.BatchOption = None,
    inputs: options.InputsOption = "random",
    keys_per_row: options.KeysPerRowOption = None,
    backward: options.BackwardOption = False,
    decode: options.DecodeOption = False,
    rows: options.RowsOption = None,
    layers: options.LayersOption = None,
    new_tokens: options.NewTokensOption = None,
    json: JsonOption = None,
    csv: options.CsvOption = None,
    plot: options.PlotOption = None,
    dry_run: options.DryRunOption = False,
    trust_remote_code: TrustOption = False,
    allow_pickle: PickleOption = False,
) -> None:
    """Time methods on this machine against torch's own exact attention."""
    made_up: dict[str, object] = {
        "--heads": heads,
        "--kv-heads": kv_heads,
        "--head-dim": head_dim,
        "--batch": batch,
    }
    made_up |= {"--pattern": pattern}
    single: dict[str, object] = {
        "--keys-per-row": keys_per_row,
        "--backward": backward,
        "--decode": decode,
    }
    single |= {"--rows": rows, "--inputs": inputs if inputs != "random" else None}
    if model is not None:
        options.refuse(made_up | single, "is for single calls, and MODEL is timed whole")
    elif inputs != "random":
        options.refuse(made_up, "is for random inputs; --inputs brings its own")
    else:
        ours: dict[str, object] = {"--layers": layers, "--trust-remote-code": trust_remote_code}
        options.refuse(ours | {"--allow-pickle": allow_pickle}, "needs a MODEL, or --inputs MODEL")
    if model is None:
        options.refuse({"--new-tokens": new_tokens}, "is for whole models: mra-cli bench MODEL")
    options.refuse({"--rows": rows} if not decode else {}, "needs --decode")
    options.refuse({"--backward": backward} if decode else {}, "can't go with --decode")
    budgets, chosen = parse_budgets(budget), parse_settings(settings or [])
    lengths = options.parse_lengths(seq_len) if seq_len is not None else None
    check_outputs({"--json": json, "--csv": csv, "--plot": plot})

    from mra_cli.bench.plots import check_can_draw
    from mra_cli.cli._output import Output
    from mra_cli.methods import make_methods

    if plot is not None:
        check_can_draw()
    methods = make_methods(method, budgets[0], chosen, impl)
    out = Output(json)

    def load(name: str) -> Checkpoint:
        from mra_cli.checkpoint import load_checkpoint

        with out.working("loading"):
            return load_checkpoint(
                name,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )

    run: Callable[..., BenchReport]
    if model is not None:
        from mra_cli.bench.model import ModelSetup, model_plan, run_model_bench

        checkpoint = load(model)
        whole = ModelSetup(
            lengths=tuple(lengths) if lengths else (None,),
            methods=tuple(m.with_budget(b) for m in methods for b in budgets),
            layers=layers,
            new_tokens=new_tokens or 16,
            pairs=pairs or 3,
            seed=seed,
        )
        plan, run = (
            partial(model_plan, checkpoint, whole),
            partial(run_model_bench, checkpoint, whole),
        )
    else:
        from mra_cli.bench.single import BenchSetup, bench_plan, run_bench
        from mra_cli.bench.workload import CapturedWorkload, RandomWorkload, Workload

        calls: Workload
        if inputs == "random":
            calls = RandomWorkload.of(
                ("CS" if decode else "NS,CS") if pattern is None else pattern,
                heads=heads or 8,
                kv_heads=kv_heads or heads or 8,
                head_dim=head_dim or 64,
                batch=batch or 1,
                dtype="float32" if dtype is None else dtype,
                device=device,
                seed=seed,
            )
        else:
            calls = CapturedWorkload.of(load(inputs), layers, seed)
        setup = BenchSetup(
            lengths=tuple(lengths or options.parse_lengths("1024")),
            methods=tuple(methods),
            budgets=tuple(budgets),
            keys_per_row=keys_per_row,
            backward=backward,
            decode=decode,
            rows=rows or 1,
            pairs=pairs,
        )
        plan, run = partial(bench_plan, calls, setup), partial(run_bench, calls, setup)
    if dry_run:
        out.bench_plan(plan())
        return
    compile_s = out.compiled()
    with out.progress() as progress:
        report = run(threads=threads, compile_s=compile_s, progress=progress)
    out.bench(report, csv=csv, plot=plot)
    if report.failed:
        raise typer.Exit(1)
