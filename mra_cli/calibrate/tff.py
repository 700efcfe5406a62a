"""Fit the feedforward kernels of linear attention, head by head, and judge each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mra_cli.calibrate.fits import Captured, Fitted, descend
from mra_cli.calibrate.gold import logits_of, some_rows
from mra_cli.calls import AttentionCall
from mra_cli.measure import relative_error
from mra_cli.methods.rows import SoftmaxRows, Tally, visible_mean
from mra_cli.methods.tff import kernel

_FEW = 1e-20


@dataclass(frozen=True)
class TffFit:
    """Kernels of queries and of keys by cross-entropy of the softmax rows, and the output's error.

    Attributes:
        kind: ``linear`` (softplus of a matrix), ``feedforward``, ``oglu`` (gated, orthogonal at
            the start), ``lowrank`` (the same with gates of a quarter of the rank).
        depth: Layers of ``oglu`` and ``lowrank``.
        orthogonality: Weight of the penalty ``mean((W W' - I)^2)`` of each kernel layer.
        accept: Heads with a larger held-out error are left exact.
        steps, rate, rows: Of the fit; random rows per step.
    """

    method: ClassVar[str] = "tff"
    kinds: ClassVar[tuple[str, ...]] = ("NS", "CS", "NC", "CC")

    kind: Literal["linear", "feedforward", "oglu", "lowrank"] = "oglu"
    depth: int = 1
    orthogonality: float = 0.0
    accept: float = 0.5
    steps: int = 150
    rate: float = 0.01
    rows: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= 8:
            raise ValueError(f"depth must be 1 to 8, got {self.depth}")

    def __call__(self, captured: Captured, generator: torch.Generator) -> Fitted:
        heads, width = captured.train[0].query.shape[1], captured.train[0].query.shape[3]
        one = self._start(heads, width, generator)
        fitted = {f"{side}.{name}": x.clone() for side in "qk" for name, x in one.items()}
        before = self.errors(captured, fitted)

        def loss(step: int) -> Tensor:
            call = captured.train[step % len(captured.train)]
            return self._loss(call, some_rows(call, self.rows, generator), fitted)

        descend(list(fitted.values()), loss, steps=self.steps, rate=self.rate, most=10.0)
        after = self.errors(captured, fitted)
        means = [
            relative_error(_mean_of_values(call), call.exact(), call.valid_rows)
            for call in captured.held_out
        ]
        return Fitted(
            fitted,
            {
                "error": float(after.mean()),
                "error_before": float(before.mean()),
                "error_of_mean": float(torch.cat(means).mean()),
                "error_by_head": after.tolist(),
                "accepted": int((after <= self.accept).sum()),
            },
        )

    def errors(self, captured: Captured, fitted: dict[str, Tensor]) -> Tensor:
        """Held-out output error of each head, float64 ``[H]``."""
        found = []
        for call in captured.held_out:
            rows = torch.arange(call.n_queries)
            output = self._attended(call, rows, fitted)[1]
            found.append(relative_error(output, call.exact(), call.valid_rows))
        return torch.cat(found).mean(0)

    def _start(self, heads: int, width: int, chance: torch.Generator) -> dict[str, Tensor]:
        """Matrices of one kernel at the start, see `kernel`."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(heads, *shape, generator=chance) * math.sqrt(2 / shape[0])

        def orthogonal() -> Tensor:
            return torch.linalg.qr(torch.randn(heads, width, width, generator=chance)).Q

        if self.kind == "linear":
            return {"w0": orthogonal()}
        if self.kind == "feedforward":
            zeros = torch.zeros(heads, width)
            return {
                "w0": normal(width, width),
                "b0": zeros,
                "w1": normal(width, width),
                "b1": zeros.clone(),
            }
        found = {}
        for layer in range(self.depth):
            found[f"w{layer}"] = orthogonal()
            if self.kind == "oglu":
                found[f"g{layer}"] = normal(width, width)
            else:
                rank = max(1, width // 4)
                found[f"ga{layer}"] = normal(width, rank)
                found[f"gb{layer}"] = normal(rank, width)
        return found

    def _loss(self, call: AttentionCall, rows: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        weights, output = self._attended(call, rows, fitted)
        exact = logits_of(call, rows).softmax(-1)
        entropy = -(exact * weights.clamp(min=_FEW).log()).sum(-1).mean((0, 2))
        target = exact @ SoftmaxRows(call, Tally()).value
        off = (output - target).square().sum((0, 2, 3)) / target.square().sum((0, 2, 3))
        loss = (entropy + off).sum()
        if self.orthogonality:
            for name, matrix in fitted.items():
                if name[2] == "w":
                    eye = torch.eye(matrix.shape[1])
                    apart = (matrix @ matrix.transpose(1, 2) - eye).square().mean()
                    loss = loss + self.orthogonality * apart * matrix.shape[0]
        return loss

    def _attended(
        self, call: AttentionCall, rows: Tensor, fitted: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Weights ``[B, H, R, M]`` and output of some rows, pair by pair."""
        found, scale = SoftmaxRows(call, Tally()), abs(call.scaling) ** 0.5
        sides = [{n[2:]: x for n, x in fitted.items() if n[0] == side} for side in "qk"]
        query = kernel(found.query[:, :, rows] * scale, sides[0], self.kind)
        key = kernel(found.key * scale, sides[1], self.kind)
        seen = logits_of(call, rows) > -torch.inf
        products = (query @ key.transpose(-1, -2)) * seen
        weights = products / products.sum(-1, keepdim=True).clamp(min=_FEW)
        return weights, weights @ found.value


def _mean_of_values(call: AttentionCall) -> Tensor:
    rows = SoftmaxRows(call, Tally())
    return visible_mean(rows.value, rows.mask)
