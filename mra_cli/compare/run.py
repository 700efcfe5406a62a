"""Run every method on the same queries, keys and values of a checkpoint, and inside it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from mra_cli.analyze import choose_sites
from mra_cli.calls import AttentionCall
from mra_cli.causality import lookahead
from mra_cli.checkpoint import Checkpoint
from mra_cli.compare.entropy import entropy_bins, squared_sums
from mra_cli.compare.report import (
    Ablation,
    CompareReport,
    Exclusion,
    Layer,
    ModelComparison,
    Row,
    Whole,
)
from mra_cli.errors import InputError
from mra_cli.evaluate import Damage, Judge
from mra_cli.inputs import Samples, probe
from mra_cli.measure import paired_times_ms, relative_error, with_peak_bytes
from mra_cli.methods import METHODS, Method, check_model
from mra_cli.methods.base import exact_products
from mra_cli.methods.rows import visible_mean
from mra_cli.patching import intercepted, patched
from mra_cli.plan import Plan
from mra_cli.progress import Progress
from mra_cli.report import Provenance
from mra_cli.sites import Site, find_sites


def compare_models(
    loaded: Sequence[tuple[Checkpoint, Samples]],
    methods: Sequence[Method],
    budgets: Sequence[float],
    *,
    layers: str | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> CompareReport:
    """Several checkpoints with their samples, one after the other; otherwise as `compare`."""
    started, found = time.perf_counter(), []
    for checkpoint, samples in loaded:

        def named(stage: str, done: int, total: int, name: str = checkpoint.name) -> None:
            progress(f"{name}: {stage}", done, total)

        found.append(
            compare(checkpoint, samples, methods, budgets, layers=layers, seed=seed, progress=named)
        )
    return CompareReport(tuple(found), time.perf_counter() - started)


@torch.no_grad()
def compare(
    checkpoint: Checkpoint,
    samples: Samples,
    methods: Sequence[Method],
    budgets: Sequence[float],
    *,
    layers: str | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> ModelComparison:
    """Measure all methods at all budgets on one checkpoint.

    One pass (every layer sees exact inputs) measures each method at each site; then the whole model
    runs with each method; then without attention, layer by layer.

    Args:
        checkpoint: The model.
        samples: What to feed it.
        methods: At any budget; see `choose_methods`.
        budgets: To try.
        layers: Which sites, see `choose_sites`; None: all that can be patched.
        seed: For masked-language models: the tokens to mask.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: ``layers`` fits no site, a method is calibrated for another model, or the
            samples are too short to approximate anything.
    """
    for method in methods:
        check_model(method, checkpoint.fingerprint)
    progress("finding attention sites", 0, 1)
    sites = choose_sites(find_sites(checkpoint.model, probe(samples)), layers)
    candidates = [method.with_budget(b) for method in methods for b in _budgets(method, budgets)]
    calls = sum(site.calls for site in sites) * len(samples.batches)
    passes = calls + len(candidates) + 2 * (len(sites) + 1)
    done = 0

    def step(stage: str) -> None:
        nonlocal done
        progress(stage, done, passes)
        done += 1

    judge = Judge(checkpoint.model, samples.batches, checkpoint.tokenizer, seed)
    timed = {kind: _middle(sites, kind) for kind in dict.fromkeys(site.kind for site in sites)}
    tally = _Tally(candidates, timed, step)
    with intercepted(checkpoint.model, {site.name: site for site in sites}, tally.record):
        for batch in samples.batches:
            checkpoint.model(**batch)
    rows = tally.rows(sites)
    whole = []
    for method in candidates:
        step(f"running the model with {method.name} at {method.budget:g}")
        able = [site for site in sites if (site.name, key_of(method)) in tally.layers]
        if able:
            with patched(checkpoint.model, Plan.uniform(able, method)):
                whole.append(Whole(method.name, method.budget, len(able), judge.judge()))
    first, ablations = Judge(checkpoint.model, samples.batches[:1], checkpoint.tokenizer, seed), []
    for removed in [sites, *([site] for site in sites)] if len(sites) > 1 else [sites]:
        name = "all" if removed is sites else removed[0].name
        damages = []
        for what, handler in (("its mean", _mean_of_values), ("nothing", _nothing)):
            step(f"replacing attention by {what}: {name}")
            damages.append(_damage(checkpoint, first, removed, handler))
        ablations.append(Ablation(name, *damages))
    return ModelComparison(
        provenance=Provenance.collect(checkpoint, samples, seed),
        sites=tuple(sites),
        rows=_at_all_budgets(rows, budgets),
        whole=_at_all_budgets(whole, budgets),
        ablations=tuple(ablations),
        excluded=tuple(tally.exclusions(methods)),
        entropy_rows=tally.entropy_rows(),
    )


_PAIRS = 7
"""Most timings of each, exact and approximated in turn."""

Key = tuple[str, float]
"""Name and budget of a method."""


def key_of(method: Method) -> Key:
    return method.name, method.budget


@dataclass
class _Cost:
    """What a method costs at the site in the middle of a kind, as in `Row`."""

    settled: dict[str, int]
    exact_ms: float
    method_ms: float
    time: float
    exact_bytes: int
    method_bytes: int
    lookahead: float | None


@dataclass
class _Tally:
    """Answers calls exactly while measuring every method on them."""

    methods: list[Method]
    timed: dict[str, str]
    step: Callable[[str], None]
    layers: dict[tuple[str, Key], tuple[float, float]] = field(default_factory=dict)
    errors: dict[tuple[str, Key], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    costs: dict[tuple[str, Key], _Cost] = field(default_factory=dict)
    seen: dict[tuple[str, Key], tuple[Method, AttentionCall]] = field(default_factory=dict)
    missed: dict[tuple[str, Key], Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)

    def record(self, site: Site, call: AttentionCall) -> Tensor:
        self.step(f"measuring {site.name}")
        exact, kind = call.exact(), site.kind
        bins = entropy_bins(call)
        ones = torch.ones_like(bins, dtype=torch.float64)[..., None]
        _grow(self.counts, kind, squared_sums(ones, bins))
        _grow(self.whole, kind, squared_sums(exact, bins))
        for method in self.methods:
            reason = _reason_against(method, site, call)
            if reason is not None:
                self.reasons[kind, method.name] = reason
                continue
            own, key = method.at(site.name), key_of(method)
            result = own(call)
            error = relative_error(result.output, exact, call.valid_rows)
            self.errors[site.name, key].append(error)
            _grow(self.missed, (kind, key), squared_sums(result.output - exact, bins))
            if (site.name, key) not in self.layers:
                share = own.multiply_adds(call, result) / exact_products(call)
                self.layers[site.name, key] = float(result.density.mean()), share
            if self.timed[kind] == site.name and (kind, key) not in self.costs:
                self.costs[kind, key] = _cost(own, call, kind)
            self.seen.setdefault((kind, key), (own, call))
        return exact

    def rows(self, sites: list[Site]) -> list[Row]:
        """One of each kind, method and budget.

        Raises:
            InputError: No method could take any call.
        """
        if not self.layers:
            raise InputError(
                f"nothing to compare: {next(iter(self.reasons.values()))}; use longer inputs"
            )
        rows = []
        for kind in dict.fromkeys(site.kind for site in sites):
            for method in self.methods:
                key = key_of(method)
                if (kind, key) not in self.seen:
                    continue
                if (kind, key) not in self.costs:  # it could not take the site in the middle
                    self.costs[kind, key] = _cost(*self.seen[kind, key], kind)
                layers = [
                    Layer(
                        site.name,
                        float(torch.cat(self.errors[site.name, key]).mean()),
                        *self.layers[site.name, key],
                    )
                    for site in sites
                    if site.kind == kind and (site.name, key) in self.layers
                ]
                missed, whole = self.missed[kind, key].tolist(), self.whole[kind].tolist()
                rows.append(
                    Row(
                        kind=kind,
                        method=method.name,
                        budget=method.budget,
                        matched=method.about.budgets,
                        layers=tuple(layers),
                        by_entropy=tuple(
                            (part / all_) ** 0.5 if all_ > 0 else None
                            for part, all_ in zip(missed, whole, strict=True)
                        ),
                        **vars(self.costs[kind, key]),
                    )
                )
        return rows

    def exclusions(self, methods: Sequence[Method]) -> list[Exclusion]:
        """Methods that took no call of a kind."""
        taken = {(kind, name) for kind, (name, _) in self.seen}
        return [
            Exclusion(kind, method.name, self.reasons[kind, method.name])
            for kind in self.timed
            for method in methods
            if (kind, method.name) in self.reasons and (kind, method.name) not in taken
        ]

    def entropy_rows(self) -> dict[str, tuple[float, ...]]:
        """Share of rows in each bin, by kind."""
        return {
            kind: tuple((counts / counts.sum()).tolist()) for kind, counts in self.counts.items()
        }


def _reason_against(method: Method, site: Site, call: AttentionCall) -> str | None:
    if site.kind not in method.about.patterns:
        return f"serves {', '.join(method.about.patterns)}"
    return method.at(site.name).reason_for_exact(call)


def _cost(method: Method, call: AttentionCall, kind: str) -> _Cost:
    times = paired_times_ms(call.exact, lambda: method(call), pairs=_PAIRS)
    _, exact_bytes = with_peak_bytes(call.exact, call.query.device)
    result, method_bytes = with_peak_bytes(lambda: method(call), call.query.device)
    moved = lookahead(lambda changed: method(changed).output, call, result.output, kind)
    settled = dict(getattr(result.plan, "settled", {}))
    latencies = statistics.median(times.first_ms), statistics.median(times.second_ms)
    return _Cost(settled, *latencies, 1 / times.speedup, exact_bytes, method_bytes, moved)


K = TypeVar("K")


def _grow(sums: dict[K, Tensor], key: K, more: Tensor) -> None:
    sums[key] = sums[key] + more if key in sums else more


def _middle(sites: list[Site], kind: str) -> str:
    names = [site.name for site in sites if site.kind == kind]
    return names[len(names) // 2]


def _budgets(method: Method, budgets: Sequence[float]) -> Sequence[float]:
    return budgets[:1] if method.about.budgets == "nothing" else budgets


R = TypeVar("R", Row, Whole)


def _at_all_budgets(found: list[R], budgets: Sequence[float]) -> tuple[R, ...]:
    """What does not depend on the budget stands at each."""
    constant = {name for name, method in METHODS.items() if method.about.budgets == "nothing"}
    repeated = [
        replace(entry, budget=budget)
        for entry in found
        for budget in (budgets if entry.method in constant else [entry.budget])
    ]
    return tuple(repeated)


def _mean_of_values(site: Site, call: AttentionCall) -> Tensor:
    assert call.mask is not None
    group = call.query.shape[1] // call.key.shape[1]
    return visible_mean(call.value.repeat_interleave(group, 1), call.mask)


def _nothing(site: Site, call: AttentionCall) -> Tensor:
    return call.value.new_zeros(*call.query.shape[:3], call.value.shape[3])


def _damage(
    checkpoint: Checkpoint,
    judge: Judge,
    sites: list[Site],
    answer: Callable[[Site, AttentionCall], Tensor],
) -> Damage:
    with intercepted(checkpoint.model, {site.name: site for site in sites}, answer):
        return judge.judge()
