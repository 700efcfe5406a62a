"""TFF: linear attention with a trainable feedforward kernel, fitted head by head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, softplus

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Choice
from mra_cli.methods.calibration import Calibrated
from mra_cli.methods.features import Features
from mra_cli.methods.rows import SoftmaxRows, Tally, runs

_SOFTPLUS_BETA = 2.5
"""Of the plain feedforward kernel, as in the authors' notebooks."""

_ROWS_PER_RUN = 128


@dataclass(frozen=True)
class Tff(Calibrated):
    """``phi(q) sum phi(k) v' / phi(q) sum phi(k)`` with a learned phi (Yorsh and Kovalenko, ICANN
    2022, arXiv 2211.04076); heads that it does not fit stay exact.

    Attributes:
        accept: Largest held-out error of a head that is approximated; None: the calibration's.
    """

    name: ClassVar[str] = "tff"
    about: ClassVar[About] = About(
        summary="linear attention with a learned kernel, in the heads that it fits",
        source="Yorsh and Kovalenko, ICANN 2022, arXiv 2211.04076",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N, and N^2 in heads left exact",
        budgets="nothing",
        masks="causal",
        honours=(),
        adapted="queries and keys have kernels of their own, fitted to the softmax",
        calibrated=True,
    )

    accept: float | None = None

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call stays exact; None: the method takes it."""
        reason = super().reason_for_exact(call)
        if reason is None and not any(self.accepted):
            reason = f"no head of {self.site} can be fitted to an error of {self.limit:g}"
        if reason is None and call.mask is not None and call.mask.is_causal:
            reason = None if call.mask.query_offset == 0 else "all queries are needed at once"
        return reason

    @property
    def limit(self) -> float:
        """Largest held-out error of a head that is approximated."""
        return float(self.source.options["accept"]) if self.accept is None else self.accept

    @property
    def accepted(self) -> list[bool]:
        """Which heads are approximated."""
        return [error <= self.limit for error in self.found["error_by_head"]]

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        accepted = torch.tensor(self.accepted[: call.query.shape[1]], device=call.query.device)
        fitted = {name: x[: len(accepted)] for name, x in self.fitted.items()}
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for takes in (True, False):
            heads = (accepted == takes).nonzero()[:, 0]
            if not len(heads):
                continue
            own, counted = heads_of(call, heads), Tally()
            if tally.entries is not None:
                counted.entries = torch.zeros_like(tally.entries[:, heads])
            rows = SoftmaxRows(own, counted)
            if takes:
                mine = {name: x[heads.cpu()] for name, x in fitted.items()}
                kernel_features(rows, mine, self.source.options, own.scaling).add_to(rows)
                parts.append((heads, rows.output(), torch.full_like(rows.lse(), -torch.inf)))
            else:
                rows.add(runs(call.n_queries, _ROWS_PER_RUN, heads.device), None)
                parts.append((heads, rows.output(), rows.lse()))
            tally.products += counted.products
            if tally.entries is not None and counted.entries is not None:
                tally.entries[:, heads] += counted.entries
        order = torch.cat([heads for heads, *_ in parts]).argsort()
        outputs, sums = (torch.cat([part[at] for part in parts], 1)[:, order] for at in (1, 2))
        return outputs, sums


def heads_of(call: AttentionCall, heads: Tensor) -> AttentionCall:
    """The call of some query heads alone, key heads repeated."""
    group = call.query.shape[1] // call.key.shape[1]
    return dataclasses.replace(
        call,
        query=call.query[:, heads],
        key=call.key[:, heads // group],
        value=call.value[:, heads // group],
        blocks=None,
    )


def kernel_features(
    rows: SoftmaxRows, fitted: dict[str, Tensor], options: dict[str, object], scaling: float
) -> Features:
    """Learned features of queries and keys; padding has none."""
    sides = []
    for side, tokens in (("q", rows.query), ("k", rows.key)):
        mine = {n.removeprefix(f"{side}."): x for n, x in fitted.items() if n[0] == side}
        sides.append(kernel(tokens * abs(scaling) ** 0.5, mine, str(options["kind"])))
        width = tokens.shape[3]
        matrices = sum(x[0].numel() for x in mine.values() if x.ndim == 3)
        rows.tally.products += tokens.numel() // width * matrices
    query, key = sides
    valid = rows.mask.key_valid
    if valid is not None:
        key = key * valid[:, None, :, None]
    return Features(query, key, query.new_zeros(query.shape[:3]))


def kernel(tokens: Tensor, fitted: dict[str, Tensor], kind: str) -> Tensor:
    """Features ``[B, H, L, m]`` of tokens ``[B, H, L, D]``, all above zero.

    Args:
        fitted: By kind, with one matrix per head (``[H, in, out]``) and layer:

            - ``linear``: ``w0``: softplus(x W).
            - ``feedforward``: ``w0``, ``b0``, ``w1``, ``b1``: softplus(gelu(x W + b) W + b).
            - ``oglu``: ``w0``, ``g0``, ``w1``, ...: act(x W) * sigmoid(x G) per layer, where act
              is softplus in the last and nothing in the others.
            - ``lowrank``: the same with gates of low rank, ``ga0 gb0``.
    """
    own = {name: x.to(tokens) for name, x in fitted.items()}
    if kind == "feedforward":
        hidden = gelu(tokens @ own["w0"] + own["b0"][:, None])
        return softplus(hidden @ own["w1"] + own["b1"][:, None], beta=_SOFTPLUS_BETA)
    depth = sum(name[0] == "w" for name in own)
    for layer in range(depth):
        out = tokens @ own[f"w{layer}"]
        if layer == depth - 1:
            out = softplus(out)
        if kind != "linear":
            gate = own[f"g{layer}"] if kind == "oglu" else own[f"ga{layer}"] @ own[f"gb{layer}"]
            out = out * torch.sigmoid(tokens @ gate)
        tokens = out
    return tokens
