"""What sparse methods learn to predict: the pairs that hold most of a row's attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.rows import SoftmaxRows, Tally

Graph = Literal["mass", "entmax"]

_BISECTIONS = 50


def logits_of(call: AttentionCall, rows: Tensor) -> Tensor:
    """Scores of some rows, -inf where the mask hides, ``[B, H, R, M]``."""
    found = SoftmaxRows(call, Tally()).logits(rows.view(1, 1, 1, -1), None)
    return found[:, :, 0]


def gold(logits: Tensor, graph: Graph, mass: float) -> Tensor:
    """The pairs to predict, bool like ``logits``.

    Args:
        graph: ``mass``: the fewest keys that hold a share ``mass`` of each row's softmax.
            ``entmax``: those that entmax-1.5 gives any weight, for models trained with it.
    """
    if graph == "entmax":
        return entmax15(logits) > 0
    order = logits.softmax(-1).sort(-1, descending=True)
    needed = order.values.cumsum(-1) - order.values < mass
    found = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order.indices, needed)
    return found & (logits > -torch.inf)


def entmax15(logits: Tensor) -> Tensor:
    """``max(0, z / 2 - tau)^2`` with the tau that makes rows sum to one (Peters et al., ACL 2019,
    arXiv 1905.05702), by bisection."""
    half = (logits - logits.amax(-1, keepdim=True)) / 2
    low, high = torch.full_like(half[..., :1], -1.0), torch.zeros_like(half[..., :1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        total = (half - middle).clamp(min=0).square().sum(-1, keepdim=True)
        low, high = torch.where(total >= 1, middle, low), torch.where(total >= 1, high, middle)
    return (half - low).clamp(min=0).square()


def some_rows(call: AttentionCall, count: int, generator: torch.Generator) -> Tensor:
    """Random real rows of the first sample, int64 ``[R]``, in order."""
    able = call.valid_rows[0].nonzero()[:, 0]
    chosen = torch.randperm(len(able), generator=generator)[:count]
    return able[chosen.to(able.device)].sort().values


def quality(logits: Tensor, kept: Tensor, wanted: Tensor, values: Tensor) -> dict[str, float]:
    """How good a choice of pairs is, mean over heads and rows.

    Args:
        logits: ``[B, H, R, M]``, -inf where hidden.
        kept, wanted: Pairs chosen and to be chosen, bool like ``logits``.
        values: ``[B, H, M, Dv]``.

    Returns:
        ``density``: kept pairs by legal ones. ``recall``: share of a row's wanted pairs that were
        kept. ``mass``: softmax mass on kept pairs. ``error``: of the output, relative, mean over
        heads.
    """
    legal = logits > -torch.inf
    kept = kept & legal
    weights = logits.softmax(-1)
    inside = weights * kept
    mass = inside.sum(-1, keepdim=True)
    exact, output = weights @ values, (inside / mass.clamp(min=1e-30)) @ values
    off = (output - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1).clamp(min=1e-30)
    return {
        "density": float(kept.sum() / legal.sum()),
        "recall": float(((kept & wanted).sum(-1) / wanted.sum(-1).clamp(min=1)).mean()),
        "mass": float(mass.mean()),
        "error": float(off.mean()),
    }
