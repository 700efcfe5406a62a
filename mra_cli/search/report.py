"""The report object of a search."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mra_cli.errors import InputError
from mra_cli.evaluate import Damage, TaskFigures
from mra_cli.forecast import Sensitivity
from mra_cli.plan import Plan
from mra_cli.report import Provenance, SiteFigures, site_figures, task_figures
from mra_cli.search.target import Target

SCHEMA = 1


@dataclass(frozen=True)
class PlanPoint:
    """One plan of the frontier.

    Attributes:
        budgets: By site, mean over heads, in the order of `SearchReport.names`; 1: exact.
        density: Share of the scores computed exactly, all sites together, on calibration text.
        harm: Foretold harm, see `Damage.harm`.
        ms: Foretold latency of all attention calls of one sample: the sum of what each took alone.
    """

    budgets: tuple[float, ...]
    density: float
    harm: float
    ms: float


@dataclass(frozen=True)
class Trial:
    """A joint run of a plan.

    Attributes:
        point: Its place among `SearchReport.frontier`.
        held_out: On held-out inputs; else on those of the calibration.
        foretold: Harm foretold before the run.
        damage: What it did.
        density: Density reached in the run.
        holds: All targets did.
    """

    point: int
    held_out: bool
    foretold: float
    damage: Damage
    density: float
    holds: bool


@dataclass(frozen=True)
class LengthSpeed:
    """Attention of the plan's sites at one length, exact and under the plan."""

    n_tokens: int
    exact_ms: float
    method_ms: float


@dataclass(frozen=True)
class SearchReport:
    """Everything a search found.

    Attributes:
        provenance: Where the figures come from; its inputs are those of the calibration.
        held_out, held_out_digest, held_out_samples: What the plan was verified on.
        method: Name and settings of the method, the budget left out.
        targets: What had to hold.
        saves: What was made small: ``density`` or ``latency``.
        names: The sites that can be approximated, in order.
        kinds: Their kinds.
        by_site: Each site at each budget, fed exactly, on the calibration's inputs.
        sensitivities: Sites approximated alone.
        frontier: Plans from the cheapest to the most expensive.
        exact_ms: Latency of all attention calls of one sample, exact.
        trials: Joint runs, in their order.
        chosen: The plan's place among `frontier`; None: no plan holds.
        plan: The plan, as JSON types; None: no plan holds.
        uniform: The damage on the same held-out inputs if every site had one budget, the density
            that the plan reached there; None: no plan holds.
        answer: What was found, in words.
        speeds: Exact attention and the plan's over length.
        min_length: The plan's break-even length; 0: not found.
        break_even: The same in words.
        tasks: What the plan does at tasks.
        seconds: Wall time, loading left out.
    """

    provenance: Provenance
    held_out: str
    held_out_digest: str
    held_out_samples: int
    method: dict[str, Any]
    targets: tuple[Target, ...]
    saves: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    by_site: tuple[SiteFigures, ...]
    sensitivities: tuple[Sensitivity, ...]
    frontier: tuple[PlanPoint, ...]
    exact_ms: float
    trials: tuple[Trial, ...]
    chosen: int | None
    plan: dict[str, Any] | None
    uniform: Damage | None
    answer: str
    speeds: tuple[LengthSpeed, ...]
    min_length: int
    break_even: str
    tasks: tuple[TaskFigures, ...]
    seconds: float
    schema: int = SCHEMA

    @property
    def verified(self) -> Trial | None:
        """The run on held-out inputs that the plan passed."""
        passed = [t for t in self.trials if t.held_out and t.holds and t.point == self.chosen]
        return passed[-1] if passed else None

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def made_plan(self) -> Plan | None:
        """The plan, if one holds."""
        return None if self.plan is None else Plan.from_dict(self.plan)

    @classmethod
    def from_json(cls, text: str) -> SearchReport:
        """The report in ``text``.

        Raises:
            InputError: Not a report of a search, or one of another schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"report schema must be {SCHEMA}, got {data['schema']}")
            parts: dict[str, Any] = {
                "provenance": Provenance(**data["provenance"]),
                "targets": tuple(Target(**t) for t in data["targets"]),
                "names": tuple(data["names"]),
                "kinds": tuple(data["kinds"]),
                "by_site": tuple(map(site_figures, data["by_site"])),
                "sensitivities": tuple(
                    Sensitivity(tuple(s["sites"]), s["budget"], s["harm"])
                    for s in data["sensitivities"]
                ),
                "frontier": tuple(
                    PlanPoint(**{**p, "budgets": tuple(p["budgets"])}) for p in data["frontier"]
                ),
                "trials": tuple(
                    Trial(**{**t, "damage": Damage(**t["damage"])}) for t in data["trials"]
                ),
                "uniform": Damage(**data["uniform"]) if data["uniform"] else None,
                "speeds": tuple(LengthSpeed(**s) for s in data["speeds"]),
                "tasks": tuple(map(task_figures, data["tasks"])),
            }
            return cls(**{**data, **parts})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a report of mra-cli search: {error}") from error
