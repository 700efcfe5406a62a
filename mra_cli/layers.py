"""Methods against exact attention at each site, on the same queries, keys and values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.measure import captured_mass, paired_latency_ms, relative_error, with_peak_bytes
from mra_cli.methods import Method
from mra_cli.patching import intercepted
from mra_cli.report import SiteFigures
from mra_cli.sites import Site


@torch.no_grad()
def measure_layers(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    sites: list[Site],
    methods: list[Method],
    step: Callable[[], None] = lambda: None,
) -> list[SiteFigures]:
    """One teacher-forced pass: every site is fed exactly and answers exactly, while every method
    is measured on its calls.

    Args:
        model: The model, unpatched.
        batches: Its inputs, one sample each.
        sites: Where to measure.
        methods: One method at several budgets.
        step: Called after each call and method.

    Raises:
        InputError: No call is long enough to approximate.
    """
    tally = _Tally(methods, step)
    with intercepted(model, {site.name: site for site in sites}, tally.record):
        for batch in batches:
            model(**batch)
    return tally.figures(sites, len(batches))


@dataclass
class _Tally:
    """Answers calls exactly while measuring every method on them."""

    methods: list[Method]
    step: Callable[[], None]
    _errors: dict[tuple[str, float], list[Tensor]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _shares: dict[tuple[str, float], list[Tensor]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _costs: dict[tuple[str, float], dict[str, Any]] = field(default_factory=dict)
    _legal: Counter[str] = field(default_factory=Counter)
    _left_exact: dict[str, str] = field(default_factory=dict)

    def record(self, site: Site, call: AttentionCall) -> Tensor:
        exact, exact_bytes = with_peak_bytes(call.exact, call.query.device)
        valid, exact_lse = call.valid_rows, call.exact_lse()
        self._legal[site.name] += call.legal_entries
        for method in (method.at(site.name) for method in self.methods):
            reason = method.reason_for_exact(call)
            if reason is not None:
                self._left_exact[site.name] = reason
                continue
            key = (site.name, method.budget)
            apply = partial(method, call)
            result, method_bytes = with_peak_bytes(apply, call.query.device)
            mass = captured_mass(result.lse, exact_lse, valid)
            self._errors[key].append(relative_error(result.output, exact, valid))
            self._shares[key].append(torch.stack([result.density, result.forced, mass]).double())
            if key not in self._costs:
                exact_ms, method_ms = paired_latency_ms(call.exact, apply)
                self._costs[key] = {
                    "exact_ms": exact_ms,
                    "method_ms": method_ms,
                    "exact_bytes": exact_bytes,
                    "method_bytes": method_bytes,
                }
            self.step()
        return exact

    def figures(self, sites: list[Site], samples: int) -> list[SiteFigures]:
        if not self._errors:
            reason = next(iter(self._left_exact.values()), "no call was seen")
            raise InputError(f"nothing to approximate at this length: {reason}; use longer inputs")
        figures = []
        for site in sites:
            for method in self.methods:
                key = (site.name, method.budget)
                if key not in self._errors:
                    continue
                by_head = torch.cat(self._errors[key]).mean(0)
                density, forced, mass = torch.cat(self._shares[key], 1).mean((1, 2)).tolist()
                figures.append(
                    SiteFigures(
                        site=site.name,
                        budget=method.budget,
                        density=density,
                        forced=forced,
                        error=float(by_head.mean()),
                        error_by_head=tuple(by_head.tolist()),
                        mass=mass,
                        legal_entries=self._legal[site.name] // samples,
                        **self._costs[key],
                    )
                )
        return figures
