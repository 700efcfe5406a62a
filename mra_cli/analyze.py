"""The main job: at which sites can attention be approximated, at which error, and what does that
do to the model?
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError, UnsupportedModelError
from mra_cli.evaluate import Damage, Judge, Task, TaskFigures
from mra_cli.forecast import ForecastFigures, Sensitivity, checked_forecast, grouped, minded
from mra_cli.inputs import Samples, probe
from mra_cli.layers import measure_layers
from mra_cli.measure import peak_process_bytes
from mra_cli.methods import Method, check_model, fitting_sites
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.progress import Meter, Progress
from mra_cli.report import AnalyzeReport, BudgetFigures, Provenance, SiteFigures, TextFigures
from mra_cli.sites import Site, find_sites

GOOD_ERROR, POOR_ERROR = 0.1, 0.3
"""Relative output errors below which a layer is called well, and above which badly approximated."""

_MOST_ALONE = 64
"""For the forecast each layer is run alone; in larger models, some together."""


@torch.no_grad()
def analyze(
    checkpoint: Checkpoint,
    samples: Samples,
    method: Method,
    budgets: Sequence[float],
    *,
    layers: str | None = None,
    tasks: Sequence[Task] = (),
    forecast: bool = False,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> AnalyzeReport:
    """Measure a method at several budgets.

    One teacher-forced pass (every layer sees exact inputs) measures each site, head and budget on
    the same queries, keys and values; then, per budget, the whole model runs approximated.

    Args:
        checkpoint: The model.
        samples: What to feed it.
        method: The method, at any budget.
        budgets: Densities to try.
        layers: Which sites, see `choose_sites`; None: all that can be patched.
        tasks: What else the model has to do, exactly and at each budget.
        forecast: Run each layer alone, too, on the first sample, and foretell plans from it.
        seed: For masked-language models: the tokens to mask.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: ``layers`` fits no site, the method serves none of them (or another model), or
            the samples are too short to approximate anything.
    """
    check_model(method, checkpoint.fingerprint)
    started = time.perf_counter()
    progress("finding attention sites", 0, 1)
    sites = find_sites(checkpoint.model, probe(samples))
    chosen = fitting_sites(method, choose_sites(sites, layers))
    methods = [method.with_budget(budget) for budget in budgets]
    calls = sum(site.calls for site in chosen) * len(samples.batches)
    meter = Meter(progress, calls * (2 * len(budgets) + (2 if forecast else 0)))

    meter.stage("running the exact model")
    judge = Judge(checkpoint.model, samples.batches, checkpoint.tokenizer, seed)
    answers = []
    for task in tasks:
        meter.stage(f"exact model: {task.name}")
        answers.append(task.run())
    meter.stage("measuring each layer")
    by_site = measure_layers(checkpoint.model, samples.batches, chosen, methods, meter.step)
    by_budget = []
    for candidate in methods:
        meter.stage(f"running the model at budget {candidate.budget:g}")
        worked = []
        with patched(checkpoint.model, Plan.uniform(chosen, candidate)):
            damage, by_part = judge.judge_parts([count for _, count in samples.parts])
            for task, answer in zip(tasks, answers, strict=True):
                meter.stage(f"{task.name} at budget {candidate.budget:g}")
                measures = task.measures(answer, task.run())
                worked.append(TaskFigures(task.name, task.items, measures))
        meter.step(calls)
        rows = [figures for figures in by_site if figures.budget == candidate.budget]
        summary = _summarised(candidate, rows, damage, sites, samples)
        texts = zip(samples.parts, by_part, strict=True)
        by_text = tuple(TextFigures(name, part) for (name, _), part in texts)
        by_budget.append(replace(summary, by_text=by_text, tasks=tuple(worked)))
    figures = None
    if forecast:
        figures = _forecast(checkpoint, judge, chosen, methods, by_site, by_budget, meter)
    settings = {key: value for key, value in method.settings().items() if key != "budget"}
    return AnalyzeReport(
        provenance=Provenance.collect(checkpoint, samples, seed),
        method=settings,
        sites=tuple(sites),
        by_site=tuple(by_site),
        by_budget=tuple(by_budget),
        seconds=time.perf_counter() - started,
        peak_process_bytes=peak_process_bytes(),
        forecast=figures,
    )


def _forecast(
    checkpoint: Checkpoint,
    judge: Judge,
    chosen: list[Site],
    methods: list[Method],
    by_site: list[SiteFigures],
    by_budget: list[BudgetFigures],
    meter: Meter,
) -> ForecastFigures | None:
    """Foretells plans from the errors of their layers and from how much the model minds each of
    them alone, and runs a plan of mixed budgets to see.
    """
    model, sites = checkpoint.model, [s for s in chosen if any(s.name == r.site for r in by_site)]
    if len(sites) < 2:
        return None
    squares = {(row.site, row.budget): row.square for row in by_site}
    middle, first = methods[len(methods) // 2], judge.of_first()
    sensitivities = []
    for group in grouped(sites, -(-len(sites) // _MOST_ALONE)):
        meter.stage(f"approximating {group[0].name} alone")
        with patched(model, Plan.uniform(group, middle)):
            harm = first.judge().harm
        names = tuple(site.name for site in group)
        sensitivities.append(Sensitivity(names, middle.budget, harm))
        meter.step()
    low, high = methods[0], methods[-1]
    plan = dict(Plan.uniform(sites[::2], low).sites)
    mixed = {name: squares[name, low.budget] for name in plan}
    words = f"budget {low.budget:g} at every other site"
    if high is not low:
        others = Plan.uniform(sites[1::2], high).sites
        mixed |= {name: squares[name, high.budget] for name in others}
        plan |= others
        words += f", {high.budget:g} at the rest"
    meter.stage("running a plan of mixed budgets")
    with patched(model, Plan(plan)):
        damage = judge.judge()
    by_method = {
        m.budget: {site.name: squares[site.name, m.budget] for site in sites} for m in methods
    }
    damages = {figures.budget: figures.damage for figures in by_budget}
    return checked_forecast(
        minded(sensitivities, squares), by_method, damages, (words, mixed, damage)
    )


def choose_sites(sites: list[Site], layers: str | None) -> list[Site]:
    """The patchable sites among ``layers``: numbers as in `check`'s table (``0,2-4``) or parts of
    names (``encoder``), separated by commas.

    Raises:
        UnsupportedModelError: No site can be patched at all.
        InputError: A part fits no patchable site.
    """
    able = {number: site for number, site in enumerate(sites) if site.verdict == "patch"}
    if not able:
        raise UnsupportedModelError(
            f"at least one attention site must be patchable, got none of {len(sites)}: "
            f"{sites[0].reason}" + ("; use longer inputs" if sites[0].verdict == "exact" else "")
        )
    if layers is None:
        return list(able.values())
    numbers: set[int] = set()
    for part in (part.strip() for part in layers.split(",")):
        low, dash, high = part.partition("-")
        if low.isdecimal() and (not dash or high.isdecimal()):
            last = int(high or low)
            inside = int(low) <= last < len(sites)  # a range that runs past the end is a slip
            fitting = {number for number in able if inside and int(low) <= number <= last}
        else:
            fitting = {number for number, site in able.items() if part and part in site.name}
        if not fitting:
            raise InputError(
                f"--layers must name patchable sites, got {part!r}; this model has the numbers "
                f"{min(able)} to {max(able)}; see them all with: mra-cli check MODEL"
            )
        numbers |= fitting
    return [able[number] for number in sorted(numbers)]


def _summarised(
    method: Method,
    rows: list[SiteFigures],
    damage: Damage,
    sites: list[Site],
    samples: Samples,
) -> BudgetFigures:
    budget = method.budget
    density = sum(row.density for row in rows) / len(rows)
    spent = f"{100 * density:.1f} % of the scores exact"
    if method.about.budgets == "multiply-adds":
        spent = f"{100 * budget:g} % of exact attention's multiply-adds"
    error = sum(row.error for row in rows) / len(rows)
    verdict, harm = _verdict(damage)
    number = {site.name: index for index, site in enumerate(sites)}
    good = [number[row.site] for row in rows if row.error <= GOOD_ERROR]
    poor = [number[row.site] for row in rows if row.error > POOR_ERROR]
    calls = {site.name: site.calls for site in sites}
    exact_ms = sum(row.exact_ms * calls[row.site] for row in rows)
    method_ms = sum(row.method_ms * calls[row.site] for row in rows)
    ratio = exact_ms / method_ms
    speed = f"{ratio:.2f}x the speed" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    answer = {"yes": "Yes", "with care": "With care", "no": "No"}[verdict]
    if verdict != "no" and ratio < 1:
        answer += ", but not to save time here"
    summary = (
        f"{answer}: with {spent}, {harm}. "
        f"Mean output error {error:.3f} over {len(rows)} sites; "
        f"at most {GOOD_ERROR:g} at {_listed(good)}; over {POOR_ERROR:g} at {_listed(poor)}. "
        f"Attention itself ran at {exact_ms:.0f} ms exact and {method_ms:.0f} ms approximated per "
        f"sample ({speed} here, at this length)."
    )
    forced = sum(row.forced for row in rows) / len(rows)
    if density > 1.02 * budget and forced > 0:
        summary += (
            f" {100 * forced:.1f} % had to be exact whatever the budget: entries that masks cut "
            "through, and rows that would see nothing."
        )
    if samples.synthetic:
        summary += " Inputs were synthetic: measure on real ones before you believe it."
    return BudgetFigures(
        budget=budget,
        density=density,
        error=error,
        damage=damage,
        exact_ms=exact_ms,
        method_ms=method_ms,
        exact_bytes=max(row.exact_bytes for row in rows),
        method_bytes=max(row.method_bytes for row in rows),
        verdict=verdict,
        summary=summary,
    )


def _verdict(damage: Damage) -> tuple[str, str]:
    """The grade, and the harm in words. Thresholds are those of the README.

    Divergence counts as well as loss: a loss can fall by luck, a divergence can't.
    """
    if damage.output_change is not None:
        words = f"the model's output moves by {100 * damage.output_change:.1f} %"
        return _grade(damage.output_change, 0.01, 0.05), words
    if damage.cosine_mean is not None and damage.cosine_min is not None:
        words = (
            f"embeddings keep a cosine of {damage.cosine_mean:.4f} to the exact ones "
            f"(lowest {damage.cosine_min:.4f})"
        )
        return _grade(1 - damage.cosine_mean, 0.005, 0.02), words
    assert damage.kl is not None and damage.top1_agreement is not None
    same = f"{100 * damage.top1_agreement:.1f} %"
    if damage.perplexity is None or damage.perplexity_exact is None:
        words = f"the most likely class stays the same for {same} (KL {damage.kl:.3f} nats)"
        return _grade(max(1 - damage.top1_agreement, damage.kl), 0.01, 0.05), words
    rise = damage.perplexity / damage.perplexity_exact - 1
    words = (
        f"perplexity goes from {damage.perplexity_exact:.2f} to {damage.perplexity:.2f} "
        f"({100 * rise:+.1f} %), the most likely token stays the same {same} of the time "
        f"(KL {damage.kl:.3f} nats)"
    )
    return _grade(max(rise, damage.kl), 0.01, 0.05), words


def _grade(harm: float, little: float, much: float) -> str:
    return "yes" if harm <= little else "with care" if harm <= much else "no"


def _listed(numbers: list[int]) -> str:
    """``sites 1, 3-5``."""
    if not numbers:
        return "none"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("site " if len(numbers) == 1 else "sites ") + ", ".join(parts)
