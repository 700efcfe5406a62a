"""Fit Linformer's mixes of keys and values at one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calibrate.fits import Captured, Fitted, descend
from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.measure import relative_error
from mra_cli.methods.linformer import mixed_softmax
from mra_cli.methods.rows import SoftmaxRows, Tally

_BUDGETS = (0.1, 0.25, 0.5)
_ROUNDS = 6


@dataclass(frozen=True)
class LinformerFit:
    """E and F of every head by the output's error, from means over runs of positions.

    A head has as many unknowns as a text has keys and values, so it is easily fitted too well: the
    last sample that is not held out tells when to stop, head by head.

    Attributes:
        ranks: Rows of E and F; none given: 10, 25 and 50 % of the length.
        steps, rate: Of the fit.
    """

    method: ClassVar[str] = "linformer"
    kinds: ClassVar[tuple[str, ...]] = ("NS", "NC")

    ranks: tuple[int, ...] = ()
    steps: int = 60
    rate: float = 0.001

    def __call__(self, captured: Captured, generator: torch.Generator) -> Fitted:
        lengths = {call.n_keys for call in (*captured.train, *captured.held_out)}
        if len(lengths) > 1:
            raise InputError(
                f"linformer is fitted at one length, and {captured.site.name} has {len(lengths)}; "
                "leave it out with --layers"
            )
        (length,) = lengths
        ranks = self.ranks or tuple(max(1, round(budget * length)) for budget in _BUDGETS)
        if max(ranks) > length:
            raise InputError(f"ranks must be at most the length {length}, got {max(ranks)}")
        fit_on, check_on = captured.train[:-1] or captured.train, captured.train[-1:]
        heads, fitted, found = captured.train[0].query.shape[1], {}, {}
        for rank in ranks:
            start = run_means(length, rank).expand(heads, -1, -1)
            mixes = [start.clone(), start.clone()]
            best, least = [mix.clone() for mix in mixes], _errors(check_on, *mixes)
            before = float(_errors(captured.held_out, *mixes).mean())

            def loss(step: int, mixes: list[Tensor] = mixes) -> Tensor:
                call = fit_on[step % len(fit_on)]
                rows, target = SoftmaxRows(call, Tally()), call.exact()
                keys, values = mixes
                output = mixed_softmax(rows.query, rows.key, rows.value, keys, values, call.scaling)
                off = (output - target).square().sum((0, 2, 3))
                return (off / target.square().sum((0, 2, 3))).sum()

            for _ in range(_ROUNDS):
                descend(mixes, loss, steps=max(1, self.steps // _ROUNDS), rate=self.rate)
                errors = _errors(check_on, *mixes)
                better = (errors < least)[:, None, None]
                best = [torch.where(better, a, b) for a, b in zip(mixes, best, strict=True)]
                least = torch.minimum(errors, least)
            fitted[f"keys_{rank}"], fitted[f"values_{rank}"] = best
            found[rank] = before, float(_errors(captured.held_out, *best).mean())
        return Fitted(
            fitted,
            {
                "length": length,
                "ranks": list(ranks),
                "error": found[ranks[-1]][1],
                "error_before": found[ranks[-1]][0],
                "error_by_rank": {str(rank): after for rank, (_, after) in found.items()},
            },
        )


def run_means(length: int, rank: int) -> Tensor:
    """Means over ``rank`` runs of positions, ``[rank, length]``."""
    run = torch.arange(length) * rank // length
    members = (run == torch.arange(rank)[:, None]).float()
    return members / members.sum(1, keepdim=True)


def _errors(calls: Sequence[AttentionCall], keys: Tensor, values: Tensor) -> Tensor:
    """Output error of each head, float64 ``[H]``."""
    found = []
    for call in calls:
        rows = SoftmaxRows(call, Tally())
        output = mixed_softmax(rows.query, rows.key, rows.value, keys, values, call.scaling)
        found.append(relative_error(output, call.exact(), call.valid_rows))
    return torch.cat(found).mean(0)
