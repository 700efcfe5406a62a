"""The report object: printed as tables, saved as JSON, read back."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from mra_cli import __version__
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate import Damage, Measure, TaskFigures
from mra_cli.forecast import ForecastCheck, ForecastFigures
from mra_cli.inputs import Samples, read_text
from mra_cli.methods import make_method
from mra_cli.plan import Plan
from mra_cli.sites import Site

SCHEMA = 1


@dataclass(frozen=True)
class Provenance:
    """Where figures come from: enough to make them again."""

    command: str
    date: str
    mra_cli: str
    torch: str
    transformers: str
    python: str
    machine: str
    threads: int
    device: str
    dtype: str
    model: str
    model_class: str
    model_fingerprint: str
    inputs: str
    inputs_digest: str
    inputs_synthetic: bool
    samples: int
    seq_len: int
    seed: int

    @classmethod
    def collect(cls, checkpoint: Checkpoint, samples: Samples, seed: int) -> Provenance:
        """The state of things now."""
        return cls(
            command=shlex.join(["mra-cli", *sys.argv[1:]]),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            mra_cli=__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            python=platform.python_version(),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_cpu()}",
            threads=torch.get_num_threads(),
            device=str(checkpoint.device),
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            model=checkpoint.name,
            model_class=type(checkpoint.model).__name__,
            model_fingerprint=checkpoint.fingerprint,
            inputs=samples.source,
            inputs_digest=samples.digest,
            inputs_synthetic=samples.synthetic,
            samples=len(samples.batches),
            seq_len=samples.length,
            seed=seed,
        )


@dataclass(frozen=True)
class SiteFigures:
    """One site at one budget, on the same queries, keys and values as exact attention.

    Attributes:
        site: Name of the site.
        budget: Density asked for.
        density, forced: Density reached, and the part the budget had no say in.
        error: Relative output error, mean over samples and heads.
        error_by_head: The same per head.
        mass: Share of the exact attention mass on exactly computed entries.
        exact_ms, method_ms: Median latency of one call, one sample.
        exact_bytes, method_bytes: Peak extra memory of one call, one sample.
        legal_entries: Scores the mask allows in one sample, over all heads and calls.
    """

    site: str
    budget: float
    density: float
    forced: float
    error: float
    error_by_head: tuple[float, ...]
    mass: float
    exact_ms: float
    method_ms: float
    exact_bytes: int
    method_bytes: int
    legal_entries: int = 0

    @property
    def square(self) -> float:
        """Squared relative output error, mean over heads; forecasts are made of these."""
        return sum(error * error for error in self.error_by_head) / len(self.error_by_head)


@dataclass(frozen=True)
class TextFigures:
    """The damage on one of several texts."""

    text: str
    damage: Damage


@dataclass(frozen=True)
class BudgetFigures:
    """The whole model at one budget, approximated at all chosen sites together.

    Attributes:
        budget: Density asked for.
        density: Density reached, mean over sites.
        error: Relative output error, mean over sites.
        damage: What it does to the model.
        by_text: The same for each text, if there are several.
        tasks: What it does to the model's work at tasks.
        exact_ms, method_ms: Latency of all attention calls of one sample.
        exact_bytes, method_bytes: Peak extra memory of the most demanding call.
        verdict: ``yes``, ``with care`` or ``no``.
        summary: The verdict in words.
    """

    budget: float
    density: float
    error: float
    damage: Damage
    exact_ms: float
    method_ms: float
    exact_bytes: int
    method_bytes: int
    verdict: str
    summary: str
    by_text: tuple[TextFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BudgetFigures:
        """The figures in JSON types."""
        texts = [TextFigures(f["text"], Damage(**f["damage"])) for f in data.get("by_text", ())]
        tasks = map(task_figures, data.get("tasks", ()))
        damage = Damage(**data["damage"])
        return cls(**{**data, "damage": damage, "by_text": tuple(texts), "tasks": tuple(tasks)})


@dataclass(frozen=True)
class AnalyzeReport:
    """Everything `analyze` found.

    Attributes:
        provenance: Where the figures come from.
        method: Name and settings of the method, the budget left out.
        sites: All attention sites of the model.
        by_site, by_budget: The figures.
        seconds: Wall time, loading left out.
        peak_process_bytes: Most memory the process held, loading included.
        forecast: What plans that were not run would do; None if nothing was run to tell.
    """

    provenance: Provenance
    method: dict[str, Any]
    sites: tuple[Site, ...]
    by_site: tuple[SiteFigures, ...]
    by_budget: tuple[BudgetFigures, ...]
    seconds: float
    peak_process_bytes: int
    forecast: ForecastFigures | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def plan(self, budget: float | None) -> Plan:
        """What was measured at one of the budgets, as a plan.

        Raises:
            InputError: No such budget, or several and none is named.
        """
        known = [figures.budget for figures in self.by_budget]
        budget = known[0] if budget is None and len(known) == 1 else budget
        if budget not in known:
            raise InputError(
                f"the report has the budgets {', '.join(f'{b:g}' for b in known)}, got "
                f"{'none' if budget is None else f'{budget:g}'}; choose one with --budget"
            )
        options = {k: v for k, v in self.method.items() if k != "method"}
        measured = {row.site for row in self.by_site if row.budget == budget}
        sites = [site for site in self.sites if site.name in measured]
        return Plan.uniform(sites, make_method(self.method["method"], budget, options))

    @classmethod
    def from_json(cls, text: str) -> AnalyzeReport:
        """The report in ``text``.

        Raises:
            InputError: Not a report of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"report schema must be {SCHEMA}, got {data['schema']}")
            return cls(
                provenance=Provenance(**data["provenance"]),
                method=data["method"],
                sites=tuple(Site.from_dict(site) for site in data["sites"]),
                by_site=tuple(map(site_figures, data["by_site"])),
                by_budget=tuple(BudgetFigures.from_dict(f) for f in data["by_budget"]),
                seconds=data["seconds"],
                peak_process_bytes=data["peak_process_bytes"],
                forecast=_forecast(data.get("forecast")),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a report of mra-cli analyze: {error}") from error


def _forecast(data: dict[str, Any] | None) -> ForecastFigures | None:
    if data is None:
        return None
    checks = tuple(ForecastCheck(**check) for check in data["checks"])
    return ForecastFigures(**{**data, "checks": checks})


def method_words(method: dict[str, Any]) -> str:
    """A method's name and settings, as `Method.settings` gives them."""
    settings = (
        f"{key}={'/'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in method.items()
        if key not in ("method", "budget") and value is not None
    )
    return f"{method['method']} ({', '.join(settings)})"


def site_figures(data: dict[str, Any]) -> SiteFigures:
    """A site's figures in JSON types, read back."""
    return SiteFigures(**{**data, "error_by_head": tuple(data["error_by_head"])})


def task_figures(data: dict[str, Any]) -> TaskFigures:
    """A task's figures in JSON types, read back."""
    measures = tuple(Measure(**measure) for measure in data["measures"])
    return TaskFigures(data["task"], data["items"], measures)


def read_plan(path: Path, budget: float | None) -> Plan:
    """The plan in a file: one that was written as such, or what a report of `analyze` measured.

    Args:
        budget: Which of a report's budgets; a plan has its own.

    Raises:
        InputError: Neither, or a budget that does not fit.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"the plan {path} must be JSON; got {error}") from error
    if isinstance(data, dict) and "by_budget" in data:
        return AnalyzeReport.from_json(text).plan(budget)
    if budget is not None:
        raise InputError(f"the plan {path} has budgets of its own; leave out --budget")
    return Plan.from_dict(data)


def _cpu() -> str:
    """The processor's name, where the system tells."""
    try:
        with open("/proc/cpuinfo") as info:  # noqa: PTH123 - a device file
            lines = [line for line in info if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown CPU"
