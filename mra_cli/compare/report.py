"""What `compare` found, as one object: printed as tables, saved as JSON, drawn, read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mra_cli.errors import InputError
from mra_cli.evaluate import Damage
from mra_cli.report import Provenance
from mra_cli.sites import Site

SCHEMA = 1

ENTROPY_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Upper edges of the bins that rows fall in by the entropy of their exact attention, as a share of
the most it could be (the logarithm of the keys they may see): 0 is one key, 1 is all alike."""


@dataclass(frozen=True)
class Layer:
    """A method at one site.

    Attributes:
        site: Name of the site.
        error: Relative output error, mean over samples and heads.
        density: Share of the legal scores computed exactly, in the first sample.
        multiply_adds: Of matrix products, by those of exact attention, in the first sample.
    """

    site: str
    error: float
    density: float
    multiply_adds: float


@dataclass(frozen=True)
class Row:
    """A method at one budget, on all sites of one kind that it could take.

    Attributes:
        kind: NS, CS, NC or CC.
        method, budget: What was asked for.
        matched: What the budget is a share of, see `About.budgets`.
        settled: Knobs that followed from it, at the site that was timed.
        layers: Site by site.
        by_entropy: Error over the rows of each bin of `ENTROPY_EDGES`, all sites together; None: no
            such rows.
        exact_ms, method_ms: Median latency of one call, at the site in the middle.
        time: Median over pairs of runs of the method's time by exact attention's.
        exact_bytes, method_bytes: Peak extra memory of that call.
        lookahead: For causal kinds: by how much the first half of the output moves when only the
            second half of the input changes, relative, at the site that moves most; else None.
    """

    kind: str
    method: str
    budget: float
    matched: str
    settled: dict[str, int]
    layers: tuple[Layer, ...]
    by_entropy: tuple[float | None, ...]
    exact_ms: float
    method_ms: float
    time: float
    exact_bytes: int
    method_bytes: int
    lookahead: float | None

    @property
    def error(self) -> float:
        """Mean over sites."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    @property
    def density(self) -> float:
        """Mean over sites."""
        return sum(layer.density for layer in self.layers) / len(self.layers)

    @property
    def multiply_adds(self) -> float:
        """Mean over sites."""
        return sum(layer.multiply_adds for layer in self.layers) / len(self.layers)


@dataclass(frozen=True)
class Whole:
    """The model with a method at work at all sites that it could take.

    Attributes:
        method, budget: Which.
        sites: How many sites.
        damage: What it does to the model.
    """

    method: str
    budget: float
    sites: int
    damage: Damage


@dataclass(frozen=True)
class Ablation:
    """What attention at one site (or at all) is worth: the model without it, on the first sample.

    Attributes:
        site: Its name; ``all``: every one that was measured.
        mean: Its output replaced by the mean of the values that each row may see.
        nothing: Replaced by zeros.
    """

    site: str
    mean: Damage
    nothing: Damage


@dataclass(frozen=True)
class Exclusion:
    """A method that can't serve a kind of sites, and why."""

    kind: str
    method: str
    reason: str


@dataclass(frozen=True)
class ModelComparison:
    """Everything found on one checkpoint.

    Attributes:
        provenance: Where the figures come from.
        sites: The attention sites that were measured.
        rows, whole, ablations, excluded: The figures.
        entropy_rows: Share of rows in each bin of `ENTROPY_EDGES`, by kind.
    """

    provenance: Provenance
    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    whole: tuple[Whole, ...]
    ablations: tuple[Ablation, ...]
    excluded: tuple[Exclusion, ...]
    entropy_rows: dict[str, tuple[float, ...]]

    def damage(self, row: Row) -> Whole:
        """The whole model with a row's method at its budget."""
        return next(w for w in self.whole if (w.method, w.budget) == (row.method, row.budget))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(row.budget for row in self.rows))

    def ranked(self, kind: str, budget: float) -> list[Row]:
        """The rows of a kind and budget, least error first."""
        rows = [row for row in self.rows if (row.kind, row.budget) == (kind, budget)]
        return sorted(rows, key=lambda row: row.error)


@dataclass(frozen=True)
class Agreement:
    """Do methods rank alike by error in two places?

    Attributes:
        first, second: Model and kind.
        budget: At which budget.
        methods: How many methods both have.
        tau: Kendall's rank correlation of the errors: 1 the same order, -1 the reverse.
    """

    first: str
    second: str
    budget: float
    methods: int
    tau: float


@dataclass(frozen=True)
class CompareReport:
    """What `compare` found.

    Attributes:
        models: One checkpoint each.
        seconds: Wall time, loading left out.
    """

    models: tuple[ModelComparison, ...]
    seconds: float
    schema: int = SCHEMA

    @property
    def agreements(self) -> list[Agreement]:
        """Of every two kinds or models that share three methods or more, at every budget."""
        places = [(model, kind) for model in self.models for kind in model.kinds]
        found = []
        for number, (first, first_kind) in enumerate(places):
            for second, second_kind in places[number + 1 :]:
                for budget in first.budgets:
                    mine = {r.method: r.error for r in first.ranked(first_kind, budget)}
                    others = {r.method: r.error for r in second.ranked(second_kind, budget)}
                    shared = [name for name in mine if name in others]
                    if len(shared) < 3:
                        continue
                    tau = kendall_tau([mine[n] for n in shared], [others[n] for n in shared])
                    names = [
                        f"{model.provenance.model} {kind}"
                        for model, kind in ((first, first_kind), (second, second_kind))
                    ]
                    found.append(Agreement(names[0], names[1], budget, len(shared), tau))
        return found

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back."""
        data = dataclasses.asdict(self)
        data["agreements"] = [dataclasses.asdict(a) for a in self.agreements]
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CompareReport:
        """The report in ``text``.

        Raises:
            InputError: Not a report of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"report schema must be {SCHEMA}, got {data['schema']}")
            return cls(tuple(_model(model) for model in data["models"]), data["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a report of mra-cli compare: {error}") from error


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points have no other that is at least as good in both numbers and better in one;
    smaller is better."""
    return [
        i
        for i, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
    ]


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau (tau-a) of two lists of the same things: pairs in the same order less pairs in
    opposite order, by all pairs."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]

    def order(values: Sequence[float], i: int, j: int) -> int:
        return (values[i] > values[j]) - (values[i] < values[j])

    return sum(order(first, i, j) * order(second, i, j) for i, j in pairs) / len(pairs)


def _model(data: dict[str, Any]) -> ModelComparison:
    def row(entry: dict[str, Any]) -> Row:
        layers = tuple(Layer(**layer) for layer in entry["layers"])
        return Row(**{**entry, "layers": layers, "by_entropy": tuple(entry["by_entropy"])})

    def ablation(entry: dict[str, Any]) -> Ablation:
        return Ablation(entry["site"], Damage(**entry["mean"]), Damage(**entry["nothing"]))

    return ModelComparison(
        provenance=Provenance(**data["provenance"]),
        sites=tuple(Site.from_dict(site) for site in data["sites"]),
        rows=tuple(row(entry) for entry in data["rows"]),
        whole=tuple(Whole(**{**w, "damage": Damage(**w["damage"])}) for w in data["whole"]),
        ablations=tuple(ablation(entry) for entry in data["ablations"]),
        excluded=tuple(Exclusion(**entry) for entry in data["excluded"]),
        entropy_rows={kind: tuple(shares) for kind, shares in data["entropy_rows"].items()},
    )
