"""The methods that can stand in for exact attention, by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Protocol

from torch import Tensor

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_cli.methods.mra import Mra
from mra_kernels import PRESETS


class Method(Protocol):
    """A way to approximate one attention call; a frozen dataclass."""

    @property
    def name(self) -> str: ...

    @property
    def budget(self) -> float: ...

    def with_budget(self, budget: float) -> Method: ...

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call is better left exact (or has to be); None if it need not."""

    def settings(self) -> dict[str, Any]:
        """Everything needed to make this method again with `make_method`, JSON types only."""

    def multiply_adds(self, call: AttentionCall, result: AttentionResult) -> int:
        """Multiply-adds this took in matrix products: scores (pooled ones, too) and weighting of
        values; exact attention takes ``legal_entries * (D + Dv)``."""

    def in_float64(self, call: AttentionCall, result: AttentionResult, heads: int) -> Tensor:
        """The first ``heads`` heads of ``result.output``, by plain torch in float64 from the same
        plan: what the result should be but for rounding."""

    def __call__(self, call: AttentionCall) -> AttentionResult: ...


_NOT_SETTINGS = ("budget", "blocks_per_row", "grid")  # said by --budget, or by the site

METHODS: dict[str, Method] = {name: Mra(name, config) for name, config in PRESETS.items()}


def make_method(name: str, budget: float, options: dict[str, Any] | None = None) -> Method:
    """The method ``name`` at ``budget``, with some of its settings changed.

    Args:
        options: Setting names and values; values may be text, as typed on a command line.

    Raises:
        InputError: No such method or setting, or a value out of range.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"method must be one of {', '.join(sorted(METHODS))}; got {name!r}; "
            f"did you mean {close!r}?"
        )
    method = METHODS[name].with_budget(budget)
    assert isinstance(method, Mra)
    fields = dataclasses.fields(method.config)
    known = {f.name: f.default for f in fields if f.name not in _NOT_SETTINGS}
    changes = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise InputError(
                f"{name} has the settings {', '.join(known)}; got {key!r}; leave it out"
            )
        changes[key] = _parsed(key, value, known[key]) if isinstance(value, str) else value
        if isinstance(changes[key], list):
            changes[key] = tuple(changes[key])
    try:
        return dataclasses.replace(method, config=dataclasses.replace(method.config, **changes))
    except ValueError as error:
        raise InputError(str(error)) from error


def _parsed(key: str, text: str, default: Any) -> Any:
    """A setting's value from text: numbers, comma-separated numbers, or words."""
    if isinstance(default, str):
        return text
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{key} must be a number or numbers like 32,1; got {text!r}") from None
    if not isinstance(default, tuple) and len(numbers) > 1:
        raise InputError(f"{key} must be one number; got {text!r}")
    return numbers if isinstance(default, tuple) else numbers[0]
