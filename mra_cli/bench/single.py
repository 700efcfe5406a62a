"""Time attention methods against torch's own exact attention, on single calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mra_cli.bench.decoding import decode_step
from mra_cli.bench.report import BenchReport, BenchRow, Refusal, command_line, timestamp
from mra_cli.bench.rounding import as_number, distance_from_float64, heads_to_check, rounding_bound
from mra_cli.bench.summary import busy_notes, call_notes, left_exact, trends
from mra_cli.bench.workload import Workload, decode_call, refused_pattern
from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.causality import lookahead
from mra_cli.environment import Environment
from mra_cli.errors import InputError
from mra_cli.measure import (
    elapsed_ms,
    paired_times_ms,
    percentile,
    relative_error,
    with_peak_bytes,
    with_resident_bytes,
)
from mra_cli.methods import Method, reason_against_impl

Progress = Callable[[str, int, int], None]

ENOUGH_MS = 20_000.0
"""No further pair of timings once a row's took this long together."""


QUICK_MS = 200.0
"""More than ten pairs are taken while a row's take less than this."""


@dataclass(frozen=True)
class BenchSetup:
    """What to time.

    Attributes:
        lengths: Keys per call; with ``decode``, tokens in the cache.
        methods: At any budget.
        budgets: Densities to try.
        keys_per_row: Instead of budgets: exact scores per query row, whatever the length.
        backward: Time forward and backward pass together.
        decode: Time ``rows`` new queries against a full cache.
        rows: See ``decode``.
        pairs: Most pairs of timings per row; None: 10, or up to 100 of calls so quick that they
            take no longer than `QUICK_MS`.
    """

    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    budgets: tuple[float, ...] = (0.25,)
    keys_per_row: int | None = None
    backward: bool = False
    decode: bool = False
    rows: int = 1
    pairs: int | None = None

    @property
    def timed(self) -> str:
        return "decode" if self.decode else "forward+backward" if self.backward else "forward"


@dataclass(frozen=True)
class Case:
    """One row to come: a method at a budget on a call, or why there will be none."""

    pattern: str
    length: int
    method: Method
    setting: str
    refusal: str | None


def cases(workload: Workload, setup: BenchSetup) -> list[Case]:
    """Everything that was asked for, with what is refused and why; nothing is computed."""
    found = []
    for pattern in workload.patterns:
        for length in setup.lengths:
            refusal = refused_pattern(pattern, decode=setup.decode)
            call = None
            try:
                if refusal is None:
                    call = workload.outline(pattern, length)
                    call = decode_call(call, setup.rows) if setup.decode else call
            except InputError as error:
                refusal = str(error)
            for method, setting in _candidates(setup, call):
                reason = refusal or _reason_against(method, pattern)
                if reason is None and call is not None:
                    reason = reason_against_impl(method, call, backward=setup.backward)
                    if reason is None and setup.decode:  # which has few queries to gain from
                        reason = method.reason_against_call(call)
                    elif reason is None:
                        reason = method.reason_for_exact(call)
                found.append(Case(pattern, length, method, setting, reason))
    return found


def bench_plan(workload: Workload, setup: BenchSetup) -> dict[str, Any]:
    """What `run_bench` would do: ``subject`` and ``runs``, JSON types only."""
    runs = [
        {
            "pattern": case.pattern,
            "length": case.length,
            "method": case.method.name,
            "budget": case.setting,
            "refused": case.refusal,
        }
        for case in cases(workload, setup)
    ]
    return {"subject": f"{workload.subject}; {workload.inputs}; {setup.timed}", "runs": runs}


def run_bench(
    workload: Workload,
    setup: BenchSetup,
    *,
    threads: int | None = None,
    compile_s: float | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> BenchReport:
    """Time every case, exact and approximated in turn.

    Args:
        workload: Where calls come from.
        setup: What to time on them.
        threads: Threads torch computes with; None: as many as it does now.
        compile_s: What compiling took beforehand, for the report.
        progress: Called as work proceeds.

    Raises:
        InputError: Everything asked for is refused.
    """
    started = time.perf_counter()
    todo = cases(workload, setup)
    rows, refused = [], [_refusal(case, case.refusal) for case in todo if case.refusal]
    runnable = [case for case in todo if case.refusal is None]
    if not runnable:
        raise InputError(f"nothing to run: {refused[0].reason}; see all with --dry-run")
    with computing_threads(threads):
        environment = Environment.collect()
        bench: _OneCall | None = None
        for number, case in enumerate(runnable):
            progress(f"{case.pattern} at {case.length}", number, len(runnable))
            try:
                if bench is None or bench.key != (case.pattern, case.length):
                    bench = _OneCall(workload, setup, case)
                first = case.length == min(c.length for c in runnable if c.setting == case.setting)
                rows.append(bench.row(case.method, lookahead=first))
            except (MemoryError, RuntimeError) as error:
                if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                    raise
                refused.append(_refusal(case, "out of memory"))
                bench = None
    decoding = []
    if setup.decode:
        outlines = [(c.method, workload.outline(c.pattern, c.length)) for c in runnable]
        decoding = left_exact([(m, decode_call(call, setup.rows)) for m, call in outlines])
    if not rows:
        raise InputError("all cases ran out of memory; use a smaller --seq-len")
    return BenchReport(
        command=command_line(),
        date=timestamp(),
        environment=environment,
        subject=workload.subject,
        inputs=workload.inputs,
        timed=setup.timed,
        threads=environment.threads,
        dtype=str(workload.dtype).removeprefix("torch."),
        device=str(workload.device),
        rows=tuple(rows),
        model_rows=(),
        refused=tuple(refused),
        trends=trends(rows, setup.timed),
        notes=(*busy_notes(environment), *call_notes(workload.random, rows), *decoding),
        compile_s=compile_s,
        seconds=time.perf_counter() - started,
    )


def sdpa(call: AttentionCall) -> Tensor:
    """Exact attention as a well-written model would call it: torch's own, nothing repeated, no
    mask that a flag can say; what torch can't say goes through `AttentionCall.exact`."""
    mask, extras = call.mask, (call.softcap, call.sinks, call.bias)
    plain = mask is not None and (mask.is_full or mask.is_plain_causal)
    if mask is None or not plain or any(extra is not None for extra in extras):
        return call.exact()
    return scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        is_causal=not mask.is_full,
        scale=call.scaling,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
    )


class _OneCall:
    """A call, exact attention on it warmed up and measured, and methods against it."""

    def __init__(self, workload: Workload, setup: BenchSetup, case: Case) -> None:
        self.key = case.pattern, case.length
        self.setup, self.pattern = setup, case.pattern
        call = workload.call(case.pattern, case.length)
        self.call = decode_call(call, setup.rows) if setup.decode else call
        if setup.backward:
            leaves = {
                n: getattr(call, n).detach().requires_grad_() for n in ("query", "key", "value")
            }
            self.call = replace(call, **leaves)
        with torch.set_grad_enabled(setup.backward):
            self.exact: Callable[[], Any] = self._timed(lambda: sdpa(self.call))
            self.exact()
            self.exact_bytes = _peak_bytes(self.exact, self.call.query.device)
            _, self.exact_ms = elapsed_ms(self.exact)
        with torch.no_grad():
            self.expected = sdpa(self.call)

    def row(self, method: Method, *, lookahead: bool) -> BenchRow:
        setup, call = self.setup, self.call
        with torch.set_grad_enabled(setup.backward):
            attend = decode_step(method, call) if setup.decode else lambda: method(call)
            result, first_ms = elapsed_ms(attend)
            timed = self._timed(lambda: attend().output)
            method_bytes = _peak_bytes(timed, call.query.device)
            _, warm_ms = elapsed_ms(timed)
            pairs = setup.pairs or max(10, min(100, int(QUICK_MS / (self.exact_ms + warm_ms))))
            times = paired_times_ms(self.exact, timed, pairs=pairs, enough_ms=ENOUGH_MS)
        with torch.no_grad():
            result = replace(result, output=result.output.detach())
            heads = heads_to_check(call, result)
            error = relative_error(result.output, self.expected, call.valid_rows)
            exact_work = call.legal_entries * (call.query.shape[-1] + call.value.shape[-1])
            return BenchRow(
                pattern=self.pattern,
                n_queries=call.n_queries,
                n_keys=call.n_keys,
                method=method.name,
                budget=method.budget,
                keys_per_row=setup.keys_per_row,
                impl=result.impl,
                density=float(result.density.mean()),
                error=as_number(float(error.mean())),
                exact_p50_ms=percentile(times.first_ms, 0.5),
                exact_p90_ms=percentile(times.first_ms, 0.9),
                method_p50_ms=percentile(times.second_ms, 0.5),
                method_p90_ms=percentile(times.second_ms, 0.9),
                pairs=len(times.first_ms),
                speedup=times.speedup,
                ideal_speedup=exact_work / max(1, method.multiply_adds(call, result)),
                exact_bytes=self.exact_bytes,
                method_bytes=method_bytes,
                first_call_ms=first_ms,
                rounding=distance_from_float64(method, call, result, heads) if heads else None,
                rounding_bound=rounding_bound(call.query.dtype),
                heads_checked=heads,
                lookahead=self._lookahead(method, result) if lookahead else None,
            )

    def _timed(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        """The forward pass, or both passes."""
        if not self.setup.backward:
            return forward
        leaves = [self.call.query, self.call.key, self.call.value]

        def both() -> tuple[Tensor, ...]:
            output = forward()
            ones = torch.ones_like(output)  # the mean of values has nothing to do with queries
            return torch.autograd.grad(output, leaves, ones, allow_unused=True)

        return both

    def _lookahead(self, method: Method, result: AttentionResult) -> float | None:
        """How much the future moves the past, where it must not."""
        if self.setup.decode:
            return None
        moved = lookahead(lambda call: method(call).output, self.call, result.output, self.pattern)
        return None if moved is None else as_number(moved)


@contextmanager
def computing_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads for a while; None: leave it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


def _candidates(setup: BenchSetup, call: AttentionCall | None) -> Iterator[tuple[Method, str]]:
    """Methods at their budgets for this call, with the setting in words."""
    for method in setup.methods:
        if setup.keys_per_row is None:
            for budget in setup.budgets:
                yield method.with_budget(budget), f"{budget:g}"
            continue
        setting, budget = f"{setup.keys_per_row} keys/row", 1.0
        if call is not None:
            rows = math.prod(call.query.shape[:3])
            budget = min(1.0, setup.keys_per_row * rows / max(1, call.legal_entries))
        yield method.with_budget(budget), setting


def _reason_against(method: Method, pattern: str) -> str | None:
    """Why a method can't run on calls of a pattern, whatever their shape."""
    if method.about.calibrated:
        return f"{method.name} was calibrated for a model; time that: mra-cli bench MODEL"
    if pattern not in method.about.patterns:
        return f"{method.name} serves {', '.join(method.about.patterns)} attention"
    return None


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The larger of tensors alive and memory held: each misses something, see `measure`."""
    (_, live), resident = with_resident_bytes(lambda: with_peak_bytes(function, device), device)
    return max(live, resident or 0)


def _refusal(case: Case, reason: str | None) -> Refusal:
    return Refusal(case.pattern, case.length, case.method.name, case.setting, reason or "")
