"""The measurements of one search, each made once and written down."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from mra_cli import __version__
from mra_cli.analyze import choose_sites
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate import Damage, Judge
from mra_cli.forecast import Forecast, Sensitivity, grouped, minded
from mra_cli.inputs import Samples, probe
from mra_cli.layers import measure_layers
from mra_cli.methods import Method, fitting_sites
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.progress import Meter, Progress
from mra_cli.report import SiteFigures, site_figures
from mra_cli.search.frontier import Point, frontier
from mra_cli.search.journal import Journal
from mra_cli.search.probing import (
    averaged,
    joint_run,
    options,
    site_plan,
    speeds_by_length,
)
from mra_cli.search.report import LengthSpeed, Trial
from mra_cli.search.target import Target, holds
from mra_cli.sites import Site, find_sites

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
"""What is tried at each site, beside leaving it exact."""

_PROBING_SHARE = 0.4
"""Of a time limit, for running sites alone."""

_PASS = 5
"""Steps of the bar for measuring the layers on one sample; running the model on it is one."""


@dataclass(frozen=True)
class SearchSetup:
    """What is looked for.

    Attributes:
        method: The method, at any budget.
        targets: What has to hold, all of it.
        budgets: Tried at each site.
        saves: What is made small: ``density`` or ``latency``.
        layers: Which sites, see `choose_sites`; None: all that can be patched.
        per_site: All heads of a site get the same, even if the method can tell them apart.
        time_limit_s: When to stop; None: when done.
        seed: What the samples were made with.
    """

    method: Method
    targets: tuple[Target, ...]
    budgets: tuple[float, ...] = BUDGETS
    saves: str = "density"
    layers: str | None = None
    per_site: bool = False
    time_limit_s: float | None = None
    seed: int = 0

    @property
    def by_head(self) -> bool:
        """Heads get budgets of their own."""
        return not self.per_site and "head_budgets" in self.method.knobs

    @property
    def harm_targets(self) -> tuple[Target, ...]:
        """Those that are not about density."""
        return tuple(target for target in self.targets if target.name != "density")


class Workbench:
    """A model on its bench.

    Args:
        checkpoint: The model.
        calibration, held_out: Inputs to search on, and to verify on.
        setup: What is looked for.
        state: Where results are kept, or None.
        progress: Called as work proceeds.

    Attributes:
        sites: Those that can be approximated, in order.
        trials: Joint runs so far, with the points they ran.
        forecast: Harm of a point from its sum, as the runs on the calibration's inputs taught.

    Raises:
        UnsupportedModelError: No site can be patched.
        InputError: The inputs are too short, a target does not fit the model, or ``state`` is
            another search's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Samples,
        held_out: Samples,
        setup: SearchSetup,
        state: Path | None,
        progress: Progress,
    ) -> None:
        self.started = time.perf_counter()
        self.checkpoint, self.setup = checkpoint, setup
        self.calibration, self.held_out = calibration, held_out
        self.journal = Journal(state, self._key())
        every = find_sites(checkpoint.model, probe(calibration))
        chosen = fitting_sites(setup.method, choose_sites(every, setup.layers))
        runs = len(calibration.batches) * (_PASS + 6) + len(held_out.batches) * 3 + len(chosen)
        self.meter = Meter(progress, runs)
        self.meter.stage("running the exact model")
        same = self._first.judge()
        for target in setup.targets:
            target.check_fits(same, checkpoint.name)
        self.by_site = self._measure_layers(chosen)
        measured = {row.site for row in self.by_site}  # calls that were too short stayed exact
        self.sites: list[Site] = [site for site in chosen if site.name in measured]
        self.trials: list[tuple[Point, Trial]] = []
        self.forecast = Forecast()

    @cached_property
    def sensitivities(self) -> list[Sensitivity]:
        """Each site approximated alone, on the first sample; some at a time if time is short."""
        budget = self.setup.budgets[len(self.setup.budgets) // 2]
        method = self.setup.method.with_budget(budget)
        size = self.journal.get("sites at a time", self._sites_at_a_time)
        found = []
        for group in grouped(self.sites, size):
            names = tuple(site.name for site in group)
            self.meter.stage(f"approximating {names[0]} alone")
            plan = Plan.uniform(group, method)
            harm = self.journal.get("alone/" + ",".join(names), partial(self._harm, plan))
            found.append(Sensitivity(names, budget, harm))
            self.meter.step(len(group))
        return found

    @cached_property
    def points(self) -> list[Point]:
        """The frontier, from the cheapest plan to the most expensive."""
        squares = {(row.site, row.budget): row.square for row in self.by_site}
        minds = minded(self.sensitivities, squares)
        ways = options(self.sites, self.by_site, minds, by_head=self.setup.by_head)
        return frontier(ways, self.setup.saves)

    @property
    def exact_ms(self) -> float:
        """Latency of all attention calls of one sample, exact."""
        each = {row.site: row.exact_ms for row in self.by_site}
        return sum(each[site.name] * site.calls for site in self.sites)

    @property
    def exact_cost(self) -> float:
        """What exact attention costs: all of the density, or its latency."""
        return self.exact_ms if self.setup.saves == "latency" else 1.0

    def plan(self, point: Point) -> Plan:
        """A point of the frontier, as a plan."""
        pairs = zip(self.sites, self.budgets(point), strict=True)
        made = {site.name: site_plan(self.setup.method, site, heads) for site, heads in pairs}
        return Plan({name: entry for name, entry in made.items() if entry is not None})

    def budgets(self, point: Point) -> list[tuple[float, ...]]:
        """A point's budgets, of all heads of each site, or of the site alone."""
        sizes = [site.heads if self.setup.by_head else 1 for site in self.sites]
        ends = list(accumulate(sizes))
        return [point.budgets[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def run(self, place: int, *, held_out: bool) -> Trial:
        """A joint run of a point; the forecast learns from those on the calibration's inputs.

        Raises:
            InputError: Time is up.
        """
        if self.time_is_up:
            path = self.journal.path
            raise InputError(
                "a plan must be verified within --time-limit, and time is up; "
                + ("give more" if path is None else f"run the same again to go on from {path}")
            )
        point, side = self.points[place], "held-out" if held_out else "calibration"
        self.meter.stage(f"running a plan of density {point.density:.2f} on the {side} inputs")
        name = f"{side}/" + ",".join(f"{budget:g}" for budget in point.budgets)
        figures, density = self.journal.get(name, lambda: self._joint(point, held_out))
        damage = Damage(**figures)
        targets = self.setup.targets if held_out else self.setup.harm_targets
        foretold = self.forecast.harm(point.harm)
        trial = Trial(place, held_out, foretold, damage, density, holds(targets, damage, density))
        self.trials.append((point, trial))
        if not held_out:
            ran = [(p.harm, t.damage.harm) for p, t in self.trials if not t.held_out]
            self.forecast = Forecast.fitted(ran)
        self.meter.step(len((self.held_out if held_out else self.calibration).batches))
        return trial

    def uniform(self, budget: float) -> Damage:
        """What one budget for all sites does on the held-out inputs."""
        self.meter.stage(f"running budget {budget:.3f} at all sites on the held-out inputs")
        plan = Plan.uniform(self.sites, self.setup.method.with_budget(budget))

        def measured() -> dict[str, Any]:
            with patched(self.checkpoint.model, plan):
                return dataclasses.asdict(self._on_held_out.judge())

        return Damage(**self.journal.get(f"held-out/{budget}", measured))

    def speeds(self, point: Point) -> list[LengthSpeed]:
        """Exact attention and a point's over length."""
        self.meter.stage("looking for the break-even length")
        rows = self.journal.get(
            "speeds/" + ",".join(f"{budget:g}" for budget in point.budgets),
            lambda: [
                dataclasses.asdict(row)
                for row in speeds_by_length(
                    self.checkpoint.model, self.plan(point), self.calibration.batches[0]
                )
            ],
        )
        return [LengthSpeed(**row) for row in rows]

    @property
    def time_is_up(self) -> bool:
        """The time limit is behind us."""
        limit = self.setup.time_limit_s
        return limit is not None and time.perf_counter() - self.started > limit

    @cached_property
    def _first(self) -> Judge:
        return self._judge(self.calibration.batches[:1])

    @cached_property
    def _on_calibration(self) -> Judge:
        batches = self.calibration.batches
        return self._first if len(batches) == 1 else self._judge(batches)

    @cached_property
    def _on_held_out(self) -> Judge:
        return self._judge(self.held_out.batches)

    def _judge(self, batches: list[dict[str, Any]]) -> Judge:
        return Judge(self.checkpoint.model, batches, self.checkpoint.tokenizer, self.setup.seed)

    def _measure_layers(self, chosen: list[Site]) -> list[SiteFigures]:
        """Each site at each budget, fed exactly."""
        methods = [self.setup.method.with_budget(budget) for budget in self.setup.budgets]

        def measured(batch: dict[str, Any]) -> list[dict[str, Any]]:
            rows = measure_layers(self.checkpoint.model, [batch], chosen, methods)
            return [dataclasses.asdict(row) for row in rows]

        passes = []
        for number, batch in enumerate(self.calibration.batches):
            self.meter.stage("measuring each layer")
            rows = self.journal.get(f"layers/{number}", partial(measured, batch))
            passes.append([site_figures(row) for row in rows])
            self.meter.step(_PASS)
        return averaged(passes)

    def _harm(self, plan: Plan) -> float:
        with patched(self.checkpoint.model, plan):
            return self._first.judge().harm

    def _joint(self, point: Point, held_out: bool) -> tuple[dict[str, Any], float]:
        judge = self._on_held_out if held_out else self._on_calibration
        plan = self.plan(point)
        damage, density = joint_run(self.checkpoint.model, self.sites, plan, judge)
        return dataclasses.asdict(damage), density

    def _sites_at_a_time(self) -> int:
        """So many that running all of them fits into its share of the time limit."""
        if self.setup.time_limit_s is None:
            return 1
        start = time.perf_counter()
        self._first.judge()
        each = 1.5 * (time.perf_counter() - start)  # approximated it can be slower
        affordable = max(1, int(_PROBING_SHARE * self.setup.time_limit_s / each))
        return -(-len(self.sites) // affordable)

    def _key(self) -> dict[str, Any]:
        """What the results depend on; targets don't enter."""
        texts = {
            name: [samples.digest, samples.length, len(samples.batches)]
            for name, samples in (
                ("calibration text", self.calibration),
                ("held-out text", self.held_out),
            )
        }
        return {
            "model": self.checkpoint.fingerprint,
            "dtype": str(self.checkpoint.dtype),
            "method": {k: v for k, v in self.setup.method.settings().items() if k != "budget"},
            "budgets": self.setup.budgets,
            "layers": self.setup.layers,
            **texts,
            "seed": self.setup.seed,
            "version of mra-cli": __version__,
            "version of torch": torch.__version__,
        }
