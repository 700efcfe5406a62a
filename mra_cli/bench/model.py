"""Time a whole model, original against patched: prefill, first token, decoding, memory."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_cli.analyze import choose_sites
from mra_cli.bench.report import BenchReport, ModelRow, Refusal, command_line, timestamp
from mra_cli.bench.single import Progress, computing_threads
from mra_cli.bench.summary import busy_notes, left_exact, trends
from mra_cli.bench.workload import decode_call, outline
from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint
from mra_cli.environment import Environment
from mra_cli.errors import InputError
from mra_cli.evaluate import Damage, Judge
from mra_cli.inputs import Samples, dry_run, make_samples, position_limit
from mra_cli.measure import elapsed_ms, with_resident_bytes
from mra_cli.methods import Method, check_model, fitting_sites, reason_against_impl
from mra_cli.patching import intercepted, patched
from mra_cli.plan import Plan
from mra_cli.sites import Site, find_sites

ENOUGH_MS = 120_000.0
"""No further pair of runs once a row's took this long together."""


@dataclass(frozen=True)
class ModelSetup:
    """What to time.

    Attributes:
        lengths: Tokens of the prompt; None: what the model takes anyway (pictures, sounds).
        methods: At their budgets.
        layers: Which sites to approximate, see `choose_sites`; None: all that can be.
        new_tokens: Tokens to decode greedily after the prompt, where the model generates.
        pairs: Runs of original and patched in turn, at most.
        seed: Chooses the text's windows.
    """

    lengths: tuple[int | None, ...]
    methods: tuple[Method, ...]
    layers: str | None = None
    new_tokens: int = 16
    pairs: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """One pass over a prompt and beyond, in milliseconds; None: the model does not generate."""

    prefill_ms: float
    first_ms: float | None = None
    ms_per_token: float | None = None


def too_long(checkpoint: Checkpoint, setup: ModelSetup) -> dict[int, str]:
    """Lengths the model can't run at, and why; everything else will run."""
    limit = position_limit(checkpoint)
    reason = f"{checkpoint.name} has {limit} positions"
    return {n: reason for n in setup.lengths if n is not None and limit is not None and n > limit}


def model_plan(checkpoint: Checkpoint, setup: ModelSetup) -> dict[str, Any]:
    """What `run_model_bench` would do: ``subject`` and ``runs``, JSON types only."""
    sites, refused = sites_to_patch(checkpoint, setup), too_long(checkpoint, setup)
    runs = [
        {
            "pattern": "model",
            "length": length,
            "method": method.name,
            "budget": f"{method.budget:g}",
            "refused": refused.get(length) if length is not None else None,
        }
        for length in setup.lengths
        for method in setup.methods
    ]
    name = type(checkpoint.model).__name__
    return {"subject": f"{checkpoint.name} ({name}), {len(sites)} sites approximated", "runs": runs}


def sites_to_patch(checkpoint: Checkpoint, setup: ModelSetup) -> list[Site]:
    """The sites that will be approximated.

    Raises:
        UnsupportedModelError: None can be.
        InputError: ``layers`` names none, or a method or an implementation can't serve.
    """
    sites = choose_sites(find_sites(checkpoint.model, dry_run(checkpoint)), setup.layers)
    call = outline(sites[0], 256, checkpoint.dtype, checkpoint.device)
    for method in setup.methods:
        check_model(method, checkpoint.fingerprint)
        fitting_sites(method, sites)
        reason = reason_against_impl(method, call)
        if reason is not None:
            raise InputError(f"--impl can't serve {checkpoint.name}: {reason}; leave it out")
    return sites


@torch.no_grad()
def run_model_bench(
    checkpoint: Checkpoint,
    setup: ModelSetup,
    *,
    threads: int | None = None,
    compile_s: float | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> BenchReport:
    """Run the model as it is and patched, in turn, at every length and with every method.

    Args:
        checkpoint: The model.
        setup: What to time.
        threads: Threads torch computes with; None: as many as it does now.
        compile_s: What compiling took beforehand, for the report.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: The model can't run at any of the lengths.
    """
    started = time.perf_counter()
    refused = too_long(checkpoint, setup)
    lengths = [length for length in setup.lengths if length is None or length not in refused]
    if not lengths:
        reason = next(iter(refused.values()))
        raise InputError(f"nothing to run: {reason}; use a smaller --seq-len")
    rows, samples = [], None
    with computing_threads(threads):
        environment = Environment.collect()
        sites = sites_to_patch(checkpoint, setup)
        for number, length in enumerate(lengths):
            samples = make_samples(checkpoint, seq_len=length, count=1, seed=setup.seed)
            progress(f"{length or 'one'} tokens, exact", number, len(lengths))
            judge = Judge(checkpoint.model, samples.batches, checkpoint.tokenizer, setup.seed)
            for method in setup.methods:
                stage = f"{length or 'one'} tokens, {method.name} at {method.budget:g}"
                progress(stage, number, len(lengths))
                rows.append(_row(checkpoint, setup, samples, sites, method, judge))
    assert samples is not None
    return BenchReport(
        command=command_line(),
        date=timestamp(),
        environment=environment,
        subject=f"{checkpoint.name} ({type(checkpoint.model).__name__}), {len(sites)} sites "
        "approximated",
        inputs=samples.source,
        timed="model",
        threads=environment.threads,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        device=str(checkpoint.device),
        rows=(),
        model_rows=tuple(rows),
        refused=tuple(
            Refusal("model", length, method.name, f"{method.budget:g}", reason)
            for length, reason in refused.items()
            for method in setup.methods
        ),
        trends=trends(rows, "model"),
        notes=(*busy_notes(environment), *_notes(checkpoint, samples, sites, setup.methods, rows)),
        compile_s=compile_s,
        seconds=time.perf_counter() - started,
    )


def _row(
    checkpoint: Checkpoint,
    setup: ModelSetup,
    samples: Samples,
    sites: list[Site],
    method: Method,
    judge: Judge,
) -> ModelRow:
    model, batch = checkpoint.model, samples.batches[0]
    plan = Plan.uniform(sites, method)
    length = samples.length or _keys(model, sites[0], batch)
    steps = setup.new_tokens if decodes(model, length + setup.new_tokens) else 0

    def run(context: AbstractContextManager[None]) -> Run:
        with context:
            return _run(model, batch, steps)

    def exact() -> Run:
        return run(nullcontext())

    def method_run() -> Run:
        return run(patched(model, plan))

    with patched(model, plan):
        damage = judge.judge()  # and the patched model is warm, as its judge made the exact one
    pairs: list[tuple[Run, Run]] = []
    exact_bytes: list[int] = []
    method_bytes: list[int] = []
    spent_ms = 0.0
    while len(pairs) < setup.pairs and spent_ms < ENOUGH_MS:
        before = time.perf_counter()
        first, second = (
            _remembering(function, seen, checkpoint.device)
            for function, seen in ((exact, exact_bytes), (method_run, method_bytes))
        )
        pairs.append((first, second))
        spent_ms += (time.perf_counter() - before) * 1e3
    firsts, seconds = zip(*pairs, strict=True)
    return ModelRow(
        n_tokens=length,
        method=method.name,
        budget=method.budget,
        sites=len(plan.sites),
        exact_prefill_ms=statistics.median(r.prefill_ms for r in firsts),
        method_prefill_ms=statistics.median(r.prefill_ms for r in seconds),
        exact_first_ms=_median([r.first_ms for r in firsts]),
        method_first_ms=_median([r.first_ms for r in seconds]),
        exact_tokens_per_s=_rate([r.ms_per_token for r in firsts]),
        method_tokens_per_s=_rate([r.ms_per_token for r in seconds]),
        pairs=len(pairs),
        speedup=statistics.median(a.prefill_ms / b.prefill_ms for a, b in pairs),
        exact_bytes=max(exact_bytes, default=None),
        method_bytes=max(method_bytes, default=None),
        harm=_harm(damage),
    )


def decodes(model: PreTrainedModel, length: int) -> bool:
    """Whether the model generates token by token, up to that length, from its input alone.

    Models with learned positions have no more than they have; rotary ones go on.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        return False
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and any(part in name for part in ("position", "wpe"))
    ]
    return all(size >= length for size in tables)


def _run(model: PreTrainedModel, batch: dict[str, Any], steps: int) -> Run:
    """The prompt in one forward pass, then greedy steps one token at a time."""
    if steps == 0:
        return Run(elapsed_ms(lambda: model(**batch))[1])
    last = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}

    def step(ids: Any, cache: Any) -> Any:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **last)

    output, prefill_ms = elapsed_ms(lambda: step(batch["input_ids"], None))
    token, choice_ms = elapsed_ms(lambda: output.logits[:, -1:].argmax(-1))
    cache = output.past_key_values

    def decode() -> None:
        following, kept = token, cache
        for _ in range(steps):
            answer = step(following, kept)
            following, kept = answer.logits[:, -1:].argmax(-1), answer.past_key_values

    _, decode_ms = elapsed_ms(decode)
    return Run(prefill_ms, prefill_ms + choice_ms, decode_ms / steps)


def _keys(model: PreTrainedModel, site: Site, batch: dict[str, Any]) -> int:
    """Keys that a site sees: the length of what is no text."""
    seen: list[int] = []

    def count(_: Site, call: AttentionCall) -> Tensor:
        seen.append(call.n_keys)
        return call.exact()

    with intercepted(model, {site.name: site}, count):
        model(**batch)
    return seen[0]


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _remembering(function: Callable[[], Run], seen: list[int], device: torch.device) -> Run:
    run, held = with_resident_bytes(function, device)
    if held is not None:
        seen.append(held)
    return run


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _rate(ms_per_token: Sequence[float | None]) -> float | None:
    middle = _median(ms_per_token)
    return None if middle is None else 1e3 / middle


def _harm(damage: Damage) -> str:
    if damage.perplexity is not None and damage.perplexity_exact is not None:
        return f"ppl {damage.perplexity_exact:.2f} -> {damage.perplexity:.2f}"
    if damage.cosine_mean is not None:
        return f"embedding cosine {damage.cosine_mean:.4f}"
    if damage.output_change is not None:
        return f"output moves {damage.output_change:.1%}"
    return f"top-1 same {damage.top1_agreement:.1%}, KL {damage.kl:.3f}"


def _notes(
    checkpoint: Checkpoint,
    samples: Samples,
    sites: list[Site],
    methods: Sequence[Method],
    rows: list[ModelRow],
) -> list[str]:
    notes = []
    if not checkpoint.model.can_generate() or checkpoint.model.config.is_encoder_decoder:
        notes.append("No decoding: timed is the forward pass alone.")
    elif any(row.exact_tokens_per_s is None for row in rows):
        notes.append("No decoding where the positions would run out: use a smaller --seq-len.")
    else:
        calls = [
            outline(sites[0], row.n_tokens, checkpoint.dtype, checkpoint.device) for row in rows
        ]
        notes += left_exact([(m, decode_call(call, 1)) for m in methods for call in calls])
    if samples.synthetic:
        notes.append("Inputs were synthetic: believe the timings, not the harm.")
    return notes
