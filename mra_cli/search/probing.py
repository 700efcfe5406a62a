"""What a search measures: each site alone, and plans on all of them together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mra_cli.bench.scaling import fitted_break_even, measured_break_even
from mra_cli.calls import AttentionCall
from mra_cli.evaluate import Damage, Judge
from mra_cli.measure import paired_latency_ms
from mra_cli.methods import Method
from mra_cli.patching import Setting, answer, intercepted
from mra_cli.plan import Plan, SitePlan
from mra_cli.report import SiteFigures
from mra_cli.search.frontier import Option
from mra_cli.search.report import LengthSpeed
from mra_cli.sites import Site

_SHORTEST = 64
"""Tokens from which on break-even is looked for, doubling."""


def averaged(passes: Sequence[Sequence[SiteFigures]]) -> list[SiteFigures]:
    """Figures over several passes: means, but for the most memory."""
    found = []
    for rows in zip(*passes, strict=True):
        heads = zip(*(row.error_by_head for row in rows), strict=True)
        means = {
            name: sum(getattr(row, name) for row in rows) / len(rows)
            for name in ("density", "forced", "error", "mass", "exact_ms", "method_ms")
        }
        by_head = tuple(sum(head) / len(rows) for head in heads)
        found.append(dataclasses.replace(rows[0], error_by_head=by_head, **means))
    return found


def options(
    sites: Sequence[Site],
    by_site: Sequence[SiteFigures],
    minds: dict[str, float],
    *,
    by_head: bool,
) -> list[list[Option]]:
    """The ways to treat each site, or each of its heads, exact among them, and what each adds to a
    plan. Heads share the harm of their site by their squared errors, and the rest evenly.
    """
    legal = {row.site: row.legal_entries for row in by_site}
    total = sum(legal[site.name] for site in sites)
    found = []
    for site in sites:
        rows = [row for row in by_site if row.site == site.name and row.budget < 1.0]
        exact_ms = sum(row.exact_ms for row in rows) / len(rows)
        if by_head:  # an exact head among others is computed as they are
            exact_ms = max(exact_ms, *(row.method_ms for row in rows))
        parts = len(rows[0].error_by_head) if by_head else 1
        share, mind, calls = legal[site.name] / total / parts, minds[site.name], site.calls / parts
        for part in range(parts):
            ways = [
                Option(
                    row.budget,
                    mind * (row.error_by_head[part] ** 2 / parts if by_head else row.square),
                    share * row.density,
                    row.method_ms * calls,
                )
                for row in rows
            ]
            found.append([*ways, Option(1.0, 0.0, share, exact_ms * calls)])
    return found


def site_plan(method: Method, site: Site, budgets: Sequence[float]) -> SitePlan | None:
    """A site under the budgets of its heads, or under the one of them all; None: exact."""
    mean = sum(budgets) / len(budgets)
    if min(budgets) == 1.0:
        return None
    made = method.with_budget(budgets[0] if len(set(budgets)) == 1 else mean)
    if len(set(budgets)) > 1:
        made = made.with_settings({"head_budgets": tuple(budgets)})
    return SitePlan(made.at(site.name), site.is_cross, site.grid)


@torch.no_grad()
def joint_run(
    model: PreTrainedModel, sites: Sequence[Site], plan: Plan, judge: Judge
) -> tuple[Damage, float]:
    """The damage of a plan, and the share of the scores of ``sites`` that it computed exactly."""
    exact, legal = 0.0, 0

    def counting(setting: Setting, call: AttentionCall) -> Tensor:
        nonlocal exact, legal
        legal += call.legal_entries
        if not isinstance(setting, SitePlan) or setting.reason_for_exact(call) is not None:
            exact += call.legal_entries
            return call.exact()
        result = setting.method(call)
        exact += float(result.density.mean()) * call.legal_entries
        return result.output

    settings: dict[str, Setting] = {site.name: plan.sites.get(site.name, site) for site in sites}
    with intercepted(model, settings, counting):
        damage = judge.judge()
    return damage, exact / max(1, legal)


@torch.no_grad()
def speeds_by_length(
    model: PreTrainedModel, plan: Plan, batch: dict[str, Any]
) -> list[LengthSpeed]:
    """Exact attention and the plan's, one after the other, on the first tokens of a sample: 64,
    128 and so on up to its own length. Nothing for models that take no text.
    """
    if "input_ids" not in batch:
        return []
    longest = batch["input_ids"].shape[1]
    doubling = (_SHORTEST << k for k in itertools.count())
    lengths = [*itertools.takewhile(lambda n: n < longest, doubling), longest]
    found = []
    for length in lengths:
        short = {
            key: value[:, :length] if key.endswith(("ids", "mask")) else value
            for key, value in batch.items()
        }
        times = [0.0, 0.0]

        def timing(site: SitePlan, call: AttentionCall, times: list[float] = times) -> Tensor:
            def approximated() -> Tensor:
                return answer(site, call)

            output = call.exact()
            if site.reason_for_exact(call) is not None:
                return output
            approximated()
            for place, ms in enumerate(paired_latency_ms(call.exact, approximated)):
                times[place] += ms
            return output

        with intercepted(model, plan.sites, timing):
            model(**short)
        if times[1] > 0:
            found.append(LengthSpeed(length, *times))
    return found


def break_even(speeds: Sequence[LengthSpeed]) -> tuple[int, str]:
    """The shortest length from which on a plan is faster than exact attention, and words.

    0: at no length that was measured.
    """
    if not speeds:
        return 0, "Break-even was not measured: no length at which anything is approximated."
    lengths = [speed.n_tokens for speed in speeds]
    exact, method = [s.exact_ms for s in speeds], [s.method_ms for s in speeds]
    measured = measured_break_even(lengths, [s.exact_ms / s.method_ms for s in speeds])
    fitted = fitted_break_even(lengths, exact, method)
    guess = "" if fitted.length is None else f"; fitted: {fitted.length:.0f} tokens"
    guess += f" ({fitted.note})" if fitted.note else ""
    if measured.length is None:
        return 0, (
            f"No time is saved here: attention under the plan is slower than exact attention at "
            f"{max(lengths)} tokens, the longest measured{guess}. min_length is left at 0."
        )
    note = f", {measured.note}" if measured.note else ""
    return int(measured.length), (
        f"Break-even at {measured.length:.0f} tokens{note}{guess}; the plan leaves shorter calls "
        "exact (min_length)."
    )
