"""What every method is, and what is the same for all of them: settings, reasons to stay exact."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_cli.methods.rows import Tally
from mra_kernels import AttentionMask

LEAST = 64
"""Calls with fewer queries or keys than this stay exact: there is nothing to gain."""

MaskKind = Literal["padding", "causal", "any"]
"""What a mask does, each kind including the one before: hides padding keys alone; hides the keys
after a row's own position, too; hides anything."""


@dataclass(frozen=True)
class About:
    """What a method says of itself; tables, `compare` and refusals are made of it.

    Attributes:
        summary: What it does, in a few words.
        source: The paper.
        patterns: Kinds of sites it serves, of NS, CS, NC, CC: noncausal or causal, self or cross.
        cost: How its work grows with N queries and keys, in words.
        budgets: What a budget is a share of: the ``scores`` that exact attention computes, all its
            ``multiply-adds`` (where few or no scores are exact), or ``nothing``: it plays no part.
        masks: The most that it can take.
        honours: What else may enter the scores: of ``bias``, ``soft-cap``, ``sinks``.
        looks_ahead: In causal calls choices depend on later tokens (what it computes never does).
        adapted: Where it departs from the paper, in words; empty: nowhere.
        calibrated: It needs a calibration on the checkpoint's own queries, keys and values.
    """

    summary: str
    source: str
    patterns: tuple[str, ...]
    cost: str
    budgets: Literal["scores", "multiply-adds", "nothing"] = "scores"
    masks: MaskKind = "any"
    honours: tuple[str, ...] = ("bias", "soft-cap", "sinks")
    looks_ahead: bool = False
    adapted: str = ""
    calibrated: bool = False


class Method(Protocol):
    """A way to approximate one attention call; a frozen dataclass."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> About: ...

    @property
    def budget(self) -> float: ...

    def with_budget(self, budget: float) -> Method: ...

    @property
    def knobs(self) -> Mapping[str, Any]:
        """Settings beside the budget, by name, and the type of each."""

    def with_settings(self, changes: Mapping[str, Any]) -> Method:
        """The same method with these knobs turned.

        Raises:
            ValueError: A value is out of range.
        """

    def settings(self) -> dict[str, Any]:
        """Everything needed to make this method again with `make_method`, JSON types only."""

    def at(self, site: str) -> Method:
        """The method as it runs at the site of that name: what was calibrated differs there."""

    def reason_against_model(self, fingerprint: str) -> str | None:
        """Why it can't serve the model of that fingerprint (`Checkpoint.fingerprint`), as one that
        was calibrated on another; None if it can."""

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call is better left exact (or has to be); None if it need not."""

    def multiply_adds(self, call: AttentionCall, result: AttentionResult) -> int:
        """Multiply-adds this took in matrix products: scores (pooled ones, too) and weighting of
        values; exact attention takes ``legal_entries * (D + Dv)``."""

    def in_float64(self, call: AttentionCall, result: AttentionResult, heads: int) -> Tensor:
        """The first ``heads`` heads of ``result.output``, by plain torch in float64 from the same
        plan: what the result should be but for rounding."""

    def __call__(self, call: AttentionCall) -> AttentionResult: ...


Choice = dict[str, Tensor]
"""What a method decided before it computed: tensors ``[B or 1, H or 1, ...]`` by name."""

A = TypeVar("A", bound="Approximation")


@dataclass(frozen=True)
class Approximation:
    """What methods have in common; their knobs are their fields.

    A method is two functions: `choose` decides (which keys, which random features), and `attend`
    computes what was decided. All else follows.

    A knob that is None by default says how much to compute, and follows from the budget until it
    is set.

    Attributes:
        budget: Share of exact attention's scores, or multiply-adds (see `About`), to spend.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    hidden: ClassVar[tuple[str, ...]] = ()
    """Fields that are no knobs, because something else says them (the site)."""

    budget: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget must be in (0, 1], got {self.budget}")

    def with_budget(self: A, budget: float) -> A:
        """The same settings with another budget."""
        try:
            return dataclasses.replace(self, budget=budget)
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def knobs(self) -> Mapping[str, Any]:
        """Settings beside the budget, and their types."""
        return knobs_of(type(self), ("budget", *self.hidden))

    def with_settings(self: A, changes: Mapping[str, Any]) -> A:
        """The same method with these knobs turned."""
        return dataclasses.replace(self, **changes)

    def settings(self) -> dict[str, Any]:
        """Name, budget and knobs, JSON types only."""
        values = {key: getattr(self, key) for key in self.knobs}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"method": self.name, "budget": self.budget, **listed}

    def at(self: A, site: str) -> A:
        """The same everywhere."""
        return self

    def reason_against_model(self, fingerprint: str) -> str | None:
        """Nothing here was fitted to one model."""
        return None

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all, as far as `About` tells; None if it can."""
        return _reason_by_about(self, call)

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call stays exact; None: the method takes it."""
        for count, what in ((call.n_queries, "queries"), (call.n_keys, "keys")):
            if count < LEAST:
                return f"{count} {what} are too few to gain anything ({LEAST})"
        return self.reason_against_call(call)

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        """What depends on the numbers, or on chance, and must not change when they are rounded."""
        return {}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, N, Dv]`` and the log-sum-exp of the exactly computed logits
        ``[B, H, N]`` (-inf where there are none), in float32 or float64.
        """
        raise NotImplementedError

    def __call__(self, call: AttentionCall) -> AttentionResult:
        tally = Tally()
        choice = self.choose(call, tally)
        output, lse = self.attend(call, choice, tally)
        plan = Chosen(self, call, choice, tally.products, tally.settled)
        return AttentionResult(output.to(call.value.dtype), lse, "torch", plan)

    def multiply_adds(self, call: AttentionCall, result: AttentionResult) -> int:
        """Multiply-adds of the matrix products that were computed, masked entries among them."""
        assert isinstance(result.plan, Chosen)
        return result.plan.products

    def in_float64(self, call: AttentionCall, result: AttentionResult, heads: int) -> Tensor:
        """The same in float64, on what was chosen."""
        assert isinstance(result.plan, Chosen)
        names = ("query", "key", "value", "sinks", "bias")
        part = call.first_heads(heads)
        wide = {name: getattr(part, name) for name in names if getattr(part, name) is not None}
        part = dataclasses.replace(part, **{name: x.double() for name, x in wide.items()})
        choice = {
            name: x if x.shape[1] == 1 else x[:, :heads] for name, x in result.plan.choice.items()
        }
        return self.attend(part, choice, Tally())[0]


@dataclass(frozen=True, eq=False)
class Chosen:
    """What an `Approximation` did in one call; the density is worked out when asked for.

    Attributes:
        method, call, choice: Who decided what.
        products: Multiply-adds in matrix products.
        settled: Knobs that followed from the budget.
    """

    method: Approximation
    call: AttentionCall
    choice: Choice
    products: int
    settled: dict[str, int]

    @cached_property
    def density(self) -> Tensor:
        """Exactly computed scores by legal ones, padding rows left out, ``[B, H]``."""
        mask = self.call.mask
        assert mask is not None
        batch, heads = self.call.query.shape[:2]
        tally = Tally(entries=torch.zeros(batch, heads, device=self.call.query.device))
        with torch.no_grad():
            self.method.attend(self.call, self.choice, tally)
        assert tally.entries is not None
        legal = (mask.legal_per_row() * self.call.valid_rows).sum(-1, keepdim=True)
        return tally.entries / legal.clamp(min=1)

    @property
    def forced(self) -> Tensor:
        """Nothing is exact whatever the budget, ``[B, H]``."""
        return torch.zeros_like(self.density)


def knob_for(budget: float, cost: Callable[[int], float], most: int) -> int:
    """The knob in 1 to ``most`` whose cost, which grows with it, comes nearest to the budget."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= budget else (middle + 1, high)
    return low - 1 if low > 1 and budget - cost(low - 1) < cost(low) - budget else low


def exact_products(call: AttentionCall) -> int:
    """Multiply-adds of exact attention on the scores that the mask allows."""
    return call.legal_entries * (call.query.shape[-1] + call.value.shape[-1])


def _reason_by_about(method: Approximation, call: AttentionCall) -> str | None:
    about, mask = method.about, call.mask
    if mask is None:
        return "its heads have different masks"
    extras = {"bias": call.bias, "soft-cap": call.softcap, "sinks": call.sinks}
    for extra, value in extras.items():
        if value is not None and extra not in about.honours:
            return f"{method.name} can't honour the {extra} of its scores"
    kind = mask_kind(mask)
    if kind != "padding" and about.masks == "padding":
        return f"{method.name} needs every row to see every key, and its mask hides some"
    if kind == "any" and about.masks == "causal":
        return f"{method.name} can honour causal masks and padding, not windows or other masks"
    apart = mask.query_offset + mask.n_queries != mask.n_keys
    if apart and not any(pattern[1] == "C" for pattern in about.patterns):
        return f"{method.name} needs queries and keys of one sequence, and these are of two"
    return None


def reason_against_part(method: Approximation, call: AttentionCall) -> str | None:
    """Why a method that cuts the sequence into blocks can't take a call; None: it is whole."""
    if call.mask is not None and call.mask.query_offset:
        return f"{method.name} needs all queries of the sequence at once"
    return None


def mask_kind(mask: AttentionMask) -> MaskKind:
    """What the mask does to rows that see anything at all."""
    if mask.dense is not None:
        return "any"
    sees = mask.stop > mask.start
    if bool((sees & (mask.start > 0)).any()):
        return "any"
    if bool(((mask.stop == mask.n_keys) | ~sees).all()):
        return "padding"
    own = sees.new_ones(mask.n_queries).cumsum(0) + mask.query_offset
    return "causal" if bool(((mask.stop == own) | ~sees).all()) else "any"


# --- settings --------------------------------------------------------------------------------


def knobs_of(cls: type, hidden: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass that are not hidden, and their types."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name not in hidden}


def setting(key: str, value: Any, kind: Any) -> Any:
    """A knob's value from text as typed, or from JSON.

    Args:
        kind: Its type, as `Method.knobs` gives it.

    Raises:
        InputError: It is no such thing.
    """
    if get_origin(kind) in (Union, types.UnionType):
        if value is None or value == "none":
            return None
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if isinstance(value, list):
        value = tuple(value)
    if get_origin(kind) is Literal:
        _expect(key, value, value in get_args(kind), f"one of {', '.join(get_args(kind))}")
        return value
    if kind is str:
        _expect(key, value, isinstance(value, str), "text")
        return value
    typed = isinstance(value, str)
    if kind is bool:
        flag = {"true": True, "false": False}.get(value) if typed else value
        _expect(key, value, isinstance(flag, bool), "true or false")
        return flag
    if kind in (int, float):
        number = _number(value, kind) if typed else value
        good = isinstance(number, int if kind is int else (int, float))
        example = "4" if kind is int else "0.5"
        _expect(key, value, good and not isinstance(number, bool), f"a number like {example}")
        return kind(number)
    if typed:
        of = float if float in get_args(kind) else int
        numbers = tuple(_number(part, of) for part in value.split(","))
        example = "0.1,0.5" if of is float else "32,1"
        _expect(key, value, None not in numbers, f"a number or numbers like {example}")
        return numbers
    return value


def _expect(key: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{key} must be {expected}; got {value!r}")


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        return kind(text)
    except ValueError:
        return None
