"""A stochastic block model of which scores matter, after SBM-Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Choice
from mra_cli.methods.calibration import Calibrated, band, nearest_point
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_cli.methods.sparsefinder import attend_kept

_DRAWN_AT_ONCE = 128


@dataclass(frozen=True)
class Sbm(Calibrated):
    """Softmax over pairs drawn at random, by memberships of queries and keys in clusters (after
    Cho et al., "Transformers meet Stochastic Block Models", NeurIPS 2022, arXiv 2210.15541).

    Attributes:
        window: Keys around a row's own that are always kept.
        first: Tokens at the beginning that see all and are seen by all.
        seed: Of the draws; each pair has its own, whatever else is in the sequence.
    """

    name: ClassVar[str] = "sbm"
    about: ClassVar[About] = About(
        summary="pairs drawn by a stochastic block model of queries and keys",
        source="after Cho et al., NeurIPS 2022, arXiv 2210.15541",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N^2 (pairs are drawn one by one)",
        adapted="fitted to the softmax mass of a trained model; probabilities scaled to the budget",
        calibrated=True,
    )

    window: int = 1
    first: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0 or self.first < 0:
            raise ValueError(
                f"window and first must be at least 0, got {self.window}, {self.first}"
            )

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows, fitted = SoftmaxRows(call, tally), self.fitted
        curve = self.found["curves"]["edges"]
        scale = fitted["scales"][nearest_point(curve, self.budget)].to(rows.query)
        query, key = (members(x, fitted, call.scaling) for x in (rows.query, rows.key))
        width, count = rows.query.shape[3], query.shape[3]
        tokens = rows.query.shape[:3].numel() + rows.key.shape[:3].numel()
        tally.products += tokens * width * (2 * width + count)
        tally.products += query.numel() * (count + call.n_keys)
        always = band(self.window, self.first, rows.mask.query_offset)
        everywhere, kept = torch.arange(call.n_keys, device=key.device), []
        for start in range(0, call.n_queries, _DRAWN_AT_ONCE):
            part = torch.arange(call.n_queries, device=key.device)[start : start + _DRAWN_AT_ONCE]
            chance = edges(query[:, :, part], key, fitted) * scale[:, None, None]
            own = part + rows.mask.query_offset
            drawn = draws(key.shape[1], own, everywhere, self.seed)
            kept.append((drawn < chance) | always(part[:, None], everywhere))
        return {"kept": torch.cat(kept, 2)}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        return attend_kept(call, choice["kept"], tally)


def members(tokens: Tensor, fitted: dict[str, Tensor], scaling: float) -> Tensor:
    """Membership of tokens ``[B, H, L, D]`` in clusters, 0 to 1, ``[B, H, L, C]``."""
    given = {name: fitted[name].to(tokens) for name in ("w1", "b1", "w2", "b2", "clusters")}
    hidden = torch.relu(tokens * abs(scaling) ** 0.5 @ given["w1"] + given["b1"][:, None])
    placed = hidden @ given["w2"] + given["b2"][:, None]
    return torch.sigmoid(placed @ given["clusters"].transpose(1, 2))


def edges(query: Tensor, key: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Chance of each pair ``[B, H, R, M]``, of memberships."""
    clusters = fitted["clusters"].to(query)
    between = (clusters @ clusters.transpose(1, 2)).flatten(1).softmax(-1)
    count = clusters.shape[1]
    return query @ between.unflatten(1, (count, count)) @ key.transpose(-1, -2)


def draws(heads: int, rows: Tensor, keys: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every head and pair of positions, ``[1, H, R, M]``, by mixing their
    bits (a hash, so that no pair's depends on how long the sequence is)."""
    head = torch.arange(heads, device=keys.device)[:, None, None]
    mixed = (head + 1) * 0x9E3779B1 + (rows[:, None] + 1) * 0x85EBCA77 + (keys + 1) * 0xC2B2AE3D
    mixed = mixed + seed * 0x27D4EB2F
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0x7FFFFFFF
    return (mixed.double() / (1 << 31)).float()[None]
