"""The search: measure sites alone, lay out the frontier, find a plan, verify it on other inputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate import Task, TaskFigures
from mra_cli.inputs import Samples
from mra_cli.methods import check_model
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.progress import Progress
from mra_cli.report import Provenance
from mra_cli.search.choosing import LEAST_SAVED, choose, worth_running
from mra_cli.search.frontier import thinned
from mra_cli.search.probing import break_even
from mra_cli.search.report import PlanPoint, SearchReport
from mra_cli.search.workbench import SearchSetup, Workbench

_POINTS_KEPT = 40


@torch.no_grad()
def search(
    checkpoint: Checkpoint,
    calibration: Samples,
    held_out: Samples,
    setup: SearchSetup,
    *,
    tasks: Sequence[Task] = (),
    state: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> SearchReport:
    """Find the cheapest plan that keeps the targets.

    Sites are measured alone on the calibration's inputs, and so are the joint plans that narrow the
    frontier down to one. That one is run on held-out inputs; while it fails there, it is made
    tighter. The report has no plan if none holds.

    Args:
        checkpoint: The model.
        calibration, held_out: Inputs to search on, and to verify on.
        setup: What is looked for.
        tasks: What the model has to do in the end, exactly and under the plan; no targets.
        state: Where results are kept, for a search that was stopped to go on.
        progress: Called as work proceeds.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: The method computes no scores, the inputs are too short, a target does not fit
            the model, ``state`` is another search's, or time is up before a plan was verified.
    """
    check_model(setup.method, checkpoint.fingerprint)
    if setup.method.about.budgets != "scores":
        raise InputError(
            f"search needs a method whose budget is a share of the scores, and {setup.method.name} "
            "computes none exactly; use mra"
        )
    progress("finding attention sites", 0, 1)
    bench = Workbench(checkpoint, calibration, held_out, setup, state, progress)
    place = choose(bench)
    points, plan = bench.points, None
    speeds, shortest, words = [], 0, ""
    worked, uniform = [], None
    if place is not None:
        verified = next(t for _, t in bench.trials if t.held_out and t.holds and t.point == place)
        uniform = bench.uniform(verified.density)
        speeds = bench.speeds(points[place])
        shortest, words = break_even(speeds)
        plan = bench.plan(points[place]).with_min_length(shortest)
        worked = [_at_work(bench, task, plan) for task in tasks]
    kept = thinned(len(points), _POINTS_KEPT, {trial.point for _, trial in bench.trials})
    return SearchReport(
        provenance=Provenance.collect(checkpoint, calibration, setup.seed),
        held_out=held_out.source,
        held_out_digest=held_out.digest,
        held_out_samples=len(held_out.batches),
        method={k: v for k, v in setup.method.settings().items() if k != "budget"},
        targets=setup.targets,
        saves=setup.saves,
        names=tuple(site.name for site in bench.sites),
        kinds=tuple(site.kind for site in bench.sites),
        by_site=tuple(bench.by_site),
        sensitivities=tuple(bench.sensitivities),
        frontier=tuple(
            PlanPoint(
                tuple(sum(heads) / len(heads) for heads in bench.budgets(point)),
                point.density,
                bench.forecast.harm(point.harm),
                point.ms,
            )
            for point in (points[k] for k in kept)
        ),
        exact_ms=bench.exact_ms,
        trials=tuple(
            dataclasses.replace(trial, point=kept.index(trial.point)) for _, trial in bench.trials
        ),
        chosen=None if place is None else kept.index(place),
        plan=None if plan is None else plan.to_dict(),
        uniform=uniform,
        answer=_answer(bench, place),
        speeds=tuple(speeds),
        min_length=shortest,
        break_even=words,
        tasks=tuple(worked),
        seconds=time.perf_counter() - bench.started,
    )


def _at_work(bench: Workbench, task: Task, plan: Plan) -> TaskFigures:
    bench.meter.stage(f"{task.name}, exact")
    exact = task.run()
    bench.meter.stage(f"{task.name}, under the plan")
    with patched(bench.checkpoint.model, plan):
        return TaskFigures(task.name, task.items, task.measures(exact, task.run()))


def _answer(bench: Workbench, place: int | None) -> str:
    setup, points = bench.setup, bench.points
    wanted = " and ".join(target.words() for target in setup.targets)
    held_out = [trial for _, trial in bench.trials if trial.held_out]
    if place is not None:
        density = next(t.density for t in held_out if t.holds and t.point == place)
        left = sum(min(heads) == 1.0 for heads in bench.budgets(points[place]))
        return (
            f"A plan keeps {wanted} on held-out inputs, with {100 * density:.1f} % of "
            f"the scores computed exactly; {left or 'none'} of {len(bench.sites)} sites "
            f"{'stays' if left == 1 else 'stay'} exact."
        )
    saves = f"{LEAST_SAVED:.0%} of the {setup.saves} of exact attention"
    if worth_running(bench) == 0:
        return f"No plan: nothing that was tried saves {saves}."
    if not setup.harm_targets and not held_out:
        return f"No plan keeps {wanted}: the budgets tried reach {points[0].density:.3f} at best."
    where = "held-out inputs" if held_out else "the calibration's own inputs"
    return (
        f"No plan that saves {saves} keeps {wanted} on {where}; {len(bench.trials)} joint runs "
        "were made."
    )
