"""Linformer: keys and values of all positions, projected to a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Choice
from mra_cli.methods.calibration import Calibrated
from mra_cli.methods.rows import SoftmaxRows, Tally, runs

_QUERIES_PER_RUN = 512


@dataclass(frozen=True)
class Linformer(Calibrated):
    """Softmax over ``E K`` and ``F V`` with learned E and F of each head (Wang et al., 2020, arXiv
    2006.04768), at the one length that they were fitted for.
    """

    name: ClassVar[str] = "linformer"
    about: ClassVar[About] = About(
        summary="learned mixes of keys and of values over positions, at one length",
        source="Wang et al., 2020, arXiv 2006.04768",
        patterns=("NS", "NC"),
        cost="N x rank",
        budgets="multiply-adds",
        masks="padding",
        honours=("soft-cap",),
        adapted="E and F of every head, fitted to a trained model's outputs",
        calibrated=True,
    )

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call stays exact; None: the method takes it."""
        reason = super().reason_for_exact(call)
        if reason is not None:
            return reason
        length = self.found["length"]
        if call.n_keys != length:
            return f"linformer was fitted for {length} keys, and got {call.n_keys}"
        if call.mask is not None and not call.mask.is_full:
            return "linformer mixes all positions, and some are padding"
        return None

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows, ranks = SoftmaxRows(call, tally), self.found["ranks"]
        wanted = self.budget * call.n_keys
        rank = min(ranks, key=lambda rank: abs(rank - wanted))
        heads = call.query.shape[1]
        mixes = (self.fitted[f"{name}_{rank}"][:heads].to(rows.key) for name in ("keys", "values"))
        key, value = (mix @ x for mix, x in zip(mixes, (rows.key, rows.value), strict=True))
        tally.products += heads * rank * call.n_keys * (key.shape[3] + value.shape[3])
        tally.products += call.query.shape[:3].numel() * rank * key.shape[3]
        lse = rows.lse()
        for own in runs(call.n_queries, _QUERIES_PER_RUN, key.device)[0, 0]:
            own = own[own >= 0]
            logits = rows.rule.logits(rows.query[:, :, own] @ key.transpose(2, 3))
            rows.add_scored(own.view(1, 1, 1, -1), logits[:, :, None], value[:, :, None])
        return rows.output(), lse


def mixed_softmax(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """The formula: softmax of ``query (keys key)'`` times ``values value``, ``[B, H, N, Dv]``."""
    logits = scaling * query @ (keys @ key).transpose(-1, -2)
    return torch.softmax(logits, -1) @ (values @ value)
