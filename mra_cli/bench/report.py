"""What `bench` found, as one object: printed as tables, saved as JSON and CSV, drawn, read back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from mra_cli.bench.scaling import BreakEven
from mra_cli.environment import Environment
from mra_cli.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class BenchRow:
    """One method at one setting on one attention call, against exact attention.

    Attributes:
        pattern: NS, CS, NC or CC.
        n_queries, n_keys: Length of the call; lengths in tables are ``n_keys``.
        method: Name of the method.
        budget: Density asked for.
        keys_per_row: What the budget was derived from, if not given itself.
        impl: The implementation that ran.
        density: Share of the legal score entries that were computed exactly.
        error: Relative output error, mean over batch and heads.
        exact_p50_ms, exact_p90_ms: Latency of exact attention in this row's pairs.
        method_p50_ms, method_p90_ms: Latency of the method.
        pairs: How many pairs that were.
        speedup: Median over pairs of exact time by the method's.
        ideal_speedup: Multiply-adds of exact attention by those of the method.
        exact_bytes, method_bytes: Peak memory of one call on top of its inputs, output included.
        first_call_ms: The method's first call, what it compiles included; in no other figure.
        rounding: Worst relative distance, over the heads checked, from the same plan computed in
            float64; None: not checked.
        rounding_bound: What rounding can explain.
        heads_checked: How many heads were, see `mra_cli.bench.rounding`.
        lookahead: For causal patterns, at the shortest length: by how much the first half of the
            output moves when only the second half of the input changes, relative; exact
            attention: 0. None: not measured.
    """

    pattern: str
    n_queries: int
    n_keys: int
    method: str
    budget: float
    keys_per_row: int | None
    impl: str
    density: float
    error: float
    exact_p50_ms: float
    exact_p90_ms: float
    method_p50_ms: float
    method_p90_ms: float
    pairs: int
    speedup: float
    ideal_speedup: float
    exact_bytes: int
    method_bytes: int
    first_call_ms: float
    rounding: float | None
    rounding_bound: float
    heads_checked: int
    lookahead: float | None

    @property
    def series(self) -> tuple[str, str]:
        """Method and setting: rows that differ in length alone share it."""
        if self.keys_per_row is not None:
            return self.method, f"{self.keys_per_row} keys/row"
        return self.method, f"{self.budget:g}"

    @property
    def of_ideal(self) -> float:
        """Fraction of the ideal speed-up that was reached."""
        return self.speedup / self.ideal_speedup

    @property
    def status(self) -> str:
        """``ok``, ``not checked`` or ``FAILED``: off its reference by more than rounding."""
        if self.rounding is None:
            return "not checked"
        return "ok" if self.rounding <= self.rounding_bound else "FAILED"


@dataclass(frozen=True)
class ModelRow:
    """A whole model at one length, original against patched.

    Attributes:
        n_tokens: Tokens of the prompt (or patches of the picture).
        method, budget: What was patched in.
        sites: Attention sites that ran approximated.
        exact_prefill_ms, method_prefill_ms: Median time of the forward pass over the prompt; for
            models that generate it fills the KV cache and gives the logits of the last row.
        exact_first_ms, method_first_ms: Median time to the first token: prefill and its choice.
        exact_tokens_per_s, method_tokens_per_s: Median decoding speed after it. None, like the
            two before: the model does not generate.
        pairs: Runs of each, in turn.
        speedup: Median over pairs of the prefill times' ratio.
        exact_bytes, method_bytes: By how much memory grew at its highest, weights left out; None:
            the system does not tell.
        harm: What it does to the model, in words.
    """

    n_tokens: int
    method: str
    budget: float
    sites: int
    exact_prefill_ms: float
    method_prefill_ms: float
    exact_first_ms: float | None
    method_first_ms: float | None
    exact_tokens_per_s: float | None
    method_tokens_per_s: float | None
    pairs: int
    speedup: float
    exact_bytes: int | None
    method_bytes: int | None
    harm: str

    @property
    def series(self) -> tuple[str, str]:
        """Method and setting: rows that differ in length alone share it."""
        return self.method, f"{self.budget:g}"


@dataclass(frozen=True)
class Refusal:
    """What was asked for and not run.

    Attributes:
        pattern: NS, CS, NC or CC; ``model`` for a whole model.
        n_keys: The length; None: every length.
        method, setting: As in a row's ``series``.
        reason: Why not.
    """

    pattern: str
    n_keys: int | None
    method: str
    setting: str
    reason: str


@dataclass(frozen=True)
class Trend:
    """One series over its lengths.

    Attributes:
        pattern: NS, CS, NC or CC; ``model`` for a whole model.
        method, setting: As in a row's ``series``.
        exact_exponent, method_exponent: Growth of the median latency with length; None: too few
            lengths.
        fitted, measured: Break-even length, see `mra_cli.bench.scaling`.
    """

    pattern: str
    method: str
    setting: str
    exact_exponent: float | None
    method_exponent: float | None
    fitted: BreakEven
    measured: BreakEven


@dataclass(frozen=True)
class BenchReport:
    """Everything one `bench` found.

    Attributes:
        command, date: How and when.
        environment: The machine and what is installed.
        subject: What ran, in words.
        inputs: Where queries, keys and values came from, in words.
        timed: ``forward``, ``forward+backward``, ``decode`` or ``model``.
        threads: Threads torch computed with.
        dtype, device: Of the inputs.
        rows: Figures of single attention calls.
        model_rows: Figures of a whole model; one of the two is empty.
        refused: What did not run.
        trends: Break-even and growth per series.
        notes: What to mind when reading the figures.
        compile_s: Seconds that compiling took before anything was timed; None: nothing to compile.
        seconds: Wall time of everything.
    """

    command: str
    date: str
    environment: Environment
    subject: str
    inputs: str
    timed: str
    threads: int
    dtype: str
    device: str
    rows: tuple[BenchRow, ...]
    model_rows: tuple[ModelRow, ...]
    refused: tuple[Refusal, ...]
    trends: tuple[Trend, ...]
    notes: tuple[str, ...]
    compile_s: float | None
    seconds: float
    schema: int = SCHEMA

    @property
    def machine(self) -> str:
        """Threads, processor, torch: one line."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{threads}, {self.environment.summary()}"

    @property
    def failed(self) -> list[BenchRow]:
        """Rows whose output misses its reference by more than rounding."""
        return [row for row in self.rows if row.status == "FAILED"]

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back. Rows carry status and fraction of the ideal."""
        data = dataclasses.asdict(self)
        for entry, row in zip(data["rows"], self.rows, strict=True):
            entry |= {"status": row.status, "of_ideal": row.of_ideal}
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BenchReport:
        """The report in ``text``.

        Raises:
            InputError: Not a report of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"report schema must be {SCHEMA}, got {data['schema']}")
            derived = ("status", "of_ideal")
            rows = [{k: v for k, v in row.items() if k not in derived} for row in data["rows"]]
            return cls(
                **{
                    **data,
                    "environment": Environment.from_dict(data["environment"]),
                    "rows": tuple(BenchRow(**row) for row in rows),
                    "model_rows": tuple(ModelRow(**row) for row in data["model_rows"]),
                    "refused": tuple(Refusal(**entry) for entry in data["refused"]),
                    "trends": tuple(_trend(entry) for entry in data["trends"]),
                    "notes": tuple(data["notes"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a report of mra-cli bench: {error}") from error

    def to_csv(self) -> str:
        """The rows as CSV with a header, a line per row."""
        rows = self.rows or self.model_rows
        out = io.StringIO()
        entries = [dataclasses.asdict(row) for row in rows]
        for entry, row in zip(entries, rows, strict=True):
            if isinstance(row, BenchRow):
                entry |= {"status": row.status, "of_ideal": row.of_ideal}
        writer = csv.DictWriter(out, fieldnames=list(entries[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
        return out.getvalue().rstrip("\n")


def command_line() -> str:
    """What was typed."""
    return shlex.join(["mra-cli", *sys.argv[1:]])


def timestamp() -> str:
    """Now, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _trend(entry: dict[str, Any]) -> Trend:
    breaks = {name: BreakEven(**entry[name]) for name in ("fitted", "measured")}
    return Trend(**{**entry, **breaks})
