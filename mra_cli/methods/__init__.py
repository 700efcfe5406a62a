"""The methods that can stand in for exact attention, by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Protocol, cast, get_args

from torch import Tensor

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_cli.methods.mra import Mra
from mra_kernels import PRESETS, implementations, native
from mra_kernels.api import Impl


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


def make_methods(names: str, budget: float, options: dict[str, Any], impl: str) -> list[Method]:
    """Several methods: names separated by commas, or ``all``; otherwise as `make_method`.

    Args:
        impl: See `with_impl`.
    """
    wanted = METHODS if names == "all" else dict.fromkeys(n.strip() for n in names.split(","))
    return [with_impl(make_method(name, budget, dict(options)), impl) for name in wanted]


def with_impl(method: Method, impl: str) -> Method:
    """The same method, computed by that implementation; ``auto``: the best one for each call.

    Raises:
        InputError: The method has no implementations to choose from, or not this one.
    """
    if impl == "auto":
        return method
    if not isinstance(method, Mra):
        raise InputError(
            f"--impl is for methods of the mra family, got {method.name}; leave it out"
        )
    if impl not in get_args(Impl):
        known = ", ".join(get_args(Impl))
        raise InputError(f"--impl must be one of {known}; got {impl!r}")
    reason = implementations()[impl]
    if reason is not None:
        raise InputError(f"--impl {impl} can't be used here: {reason}")
    return dataclasses.replace(method, impl=cast(Impl, impl))


def reason_against_impl(
    method: Method, call: AttentionCall, *, backward: bool = False
) -> str | None:
    """Why the implementation that was asked for can't compute a call; None if it can, or if none
    was asked for."""
    if not isinstance(method, Mra) or method.impl != "native":
        return None
    if backward:
        return "native has no gradients"
    tensors = call.query, call.key, call.value, call.sinks, call.bias
    return native.reason_against(*tensors, mask=call.mask)


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
