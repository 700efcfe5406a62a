"""The methods that can stand in for exact attention, by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, get_args

from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.methods.base import Method, setting
from mra_cli.methods.bigbird import BigBird
from mra_cli.methods.cluster_kv import ClusterKV
from mra_cli.methods.combiner import Combiner
from mra_cli.methods.h1d import H1D
from mra_cli.methods.linformer import Linformer
from mra_cli.methods.longformer import Longformer
from mra_cli.methods.mra import Mra, MraFamily
from mra_cli.methods.mra_keys import MraKeys
from mra_cli.methods.nystrom import Nystrom
from mra_cli.methods.performer import Performer
from mra_cli.methods.probsparse import ProbSparse
from mra_cli.methods.sbm import Sbm
from mra_cli.methods.scatterbrain import Scatterbrain
from mra_cli.methods.skein import Skein
from mra_cli.methods.smyrf import Smyrf
from mra_cli.methods.sparsefinder import Sparsefinder
from mra_cli.methods.tff import Tff
from mra_cli.methods.topk import TopK
from mra_cli.methods.vmean import VMean
from mra_cli.methods.window import Window
from mra_kernels import PRESETS, MraKeysConfig, implementations, reason_against
from mra_kernels.api import Impl

if TYPE_CHECKING:
    from mra_cli.sites import Site

__all__ = ["METHODS", "REFUSED", "Method", "make_method", "make_methods", "with_impl"]

_OTHERS: tuple[Method, ...] = (
    Smyrf(),
    Skein(),
    ProbSparse(),
    Nystrom(),
    Performer(),
    Scatterbrain(),
    Longformer(),
    BigBird(),
    H1D(),
    Combiner(),
    ClusterKV(),
    TopK(),
    Window(),
    VMean(),
    Sparsefinder(),
    Tff(),
    Linformer(),
    Sbm(),
)

METHODS: dict[str, Method] = {
    name: MraKeys(name, config) if isinstance(config, MraKeysConfig) else Mra(name, config)
    for name, config in PRESETS.items()
}
METHODS |= {method.name: method for method in _OTHERS}

REFUSED: dict[str, str] = {
    "reformer": "it shares one projection between queries and keys, which the model does not; "
    "smyrf hashes both as they are",
    "soft": "its Gaussian kernel of shared queries and keys is no softmax",
    "yoso": "its Bernoulli weights are of normalised queries and keys, and are no softmax",
    "cosformer": "its cosine-weighted ReLU kernel is no softmax",
    "cloudattention": "it is an architecture for point clouds, not attention over sequences",
}
"""Methods that no checkpoint can be approximated with as it is, and why."""


def make_method(name: str, budget: float, options: Mapping[str, Any] | None = None) -> Method:
    """The method ``name`` at ``budget``, with some of its settings changed.

    Args:
        options: Setting names and values; values may be text, as typed on a command line.

    Raises:
        InputError: No such method or setting, or a value out of range.
    """
    if name in REFUSED and name not in METHODS:
        raise InputError(f"{name} needs a model trained with it: {REFUSED[name]}; choose another")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"method must be one of {', '.join(sorted(METHODS))}; got {name!r}; "
            f"did you mean {close!r}?"
        )
    method = METHODS[name].with_budget(budget)
    changes = {}
    for key, value in (options or {}).items():
        if key not in method.knobs:
            close_keys = difflib.get_close_matches(key, method.knobs, n=1)
            advice = f"did you mean {close_keys[0]!r}?" if close_keys else "leave it out"
            known = ", ".join(method.knobs) or "no settings"
            raise InputError(f"{name} has the settings {known}; got {key!r}; {advice}")
        changes[key] = setting(key, value, method.knobs[key])
    try:
        return method.with_settings(changes)
    except ValueError as error:
        raise InputError(str(error)) from error


def make_methods(names: str, budget: float, options: Mapping[str, Any], impl: str) -> list[Method]:
    """Several methods: names separated by commas, or ``all``; otherwise as `make_method`.

    ``all`` leaves out methods that need a calibration, which has to be named.

    Args:
        impl: See `with_impl`.
    """
    wanted = (
        [name for name, method in METHODS.items() if not method.about.calibrated]
        if names == "all"
        else list(dict.fromkeys(n.strip() for n in names.split(",")))
    )
    return [with_impl(make_method(name, budget, options), impl) for name in wanted]


def fitting_sites(method: Method, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites whose kind the method can serve.

    Raises:
        InputError: None of them.
    """
    sites = list(sites)
    found = [site for site in sites if site.kind in method.about.patterns]
    if not found:
        raise InputError(
            f"{method.name} serves {', '.join(method.about.patterns)} attention, and these sites "
            f"are {', '.join(sorted({site.kind for site in sites}))}; choose another method"
        )
    return found


def check_model(method: Method, fingerprint: str) -> None:
    """Refuse a method that was calibrated on another model.

    Raises:
        InputError: It was.
    """
    reason = method.reason_against_model(fingerprint)
    if reason is not None:
        raise InputError(reason)


def with_impl(method: Method, impl: str) -> Method:
    """The same method, computed by that implementation; ``auto``: the best one for each call.

    Raises:
        InputError: The method has no implementations to choose from, or not this one.
    """
    if impl == "auto":
        return method
    if not isinstance(method, MraFamily):
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
    if not isinstance(method, MraFamily) or method.impl == "auto":
        return None
    if backward and method.impl == "native":
        return "native has no gradients"
    tensors = call.query, call.key, call.value, call.sinks
    return reason_against(
        method.impl, *tensors, mask=call.mask, config=method.config, bias=call.bias
    )
