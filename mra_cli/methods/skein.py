"""Skeinformer: a few columns of the attention matrix exactly, the others by their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally, runs, take


@dataclass(frozen=True)
class Skein(Approximation):
    """Column sampling with adaptive row normalisation and reused pilot rows (Chen et al., NAACL
    2022, arXiv 2112.05359).

    Random pilot rows are computed exactly; columns are drawn by the weight that these give to them,
    times the norm of their values. In every other row the columns left out share the geometric mean
    of the scores computed.

    Attributes:
        columns: Columns, and pilot rows.
        seed: Of the draws.
    """

    name: ClassVar[str] = "skein"
    about: ClassVar[About] = About(
        summary="sampled columns and pilot rows exactly, the rest at the row's geometric mean",
        source="Skeinformer: Chen et al., NAACL 2022, arXiv 2112.05359",
        patterns=("NS", "NC"),
        cost="N x columns",
        masks="padding",
    )

    columns: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}")

    def count(self, call: AttentionCall) -> int:
        """Columns: the setting, or what the budget allows for them and as many pilot rows."""
        if self.columns is not None or self.budget == 1.0:
            return min(self.columns or call.n_keys, call.n_keys)
        n, m = call.n_queries, call.n_keys
        both = (n + m - ((n + m) ** 2 - 4 * n * m * self.budget) ** 0.5) / 2
        return max(1, min(n, m, round(both)))

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows = SoftmaxRows(call, tally)
        batch, heads, n_queries, _ = rows.query.shape
        count, mask = self.count(call), rows.mask
        generator = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(1, min(count, n_queries), generator=generator, dtype=torch.float64)
        ones = mask.start.new_ones(batch, n_queries)
        real = ones if mask.query_valid is None else mask.query_valid.long().expand(batch, -1)
        # The k-th real row of each batch entry, so that padding moves nothing.
        kth = (luck.to(real.device) * real.sum(1, keepdim=True)).long()
        pilots = torch.searchsorted(real.cumsum(1), kth + 1)[:, None, None]  # [B, 1, 1, d]
        with torch.no_grad():
            weights = rows.logits(pilots, None).softmax(-1)[:, :, 0]
            tally.products += weights.numel() * rows.query.shape[3]
            chances = weights.norm(dim=2) * rows.value.norm(dim=3)
            if mask.key_valid is not None:
                chances = chances.masked_fill(~mask.key_valid[:, None], 0.0)
            # The largest of luck ** (1 / chance) are a draw without replacement in proportion.
            # Drawn key by key, so that padding moves nothing here, either.
            tickets = torch.rand(call.n_keys, heads, generator=generator).T.to(chances)
            drawn = (tickets.log() / chances.clamp(min=1e-30)).masked_fill(chances == 0, -torch.inf)
            best = drawn.topk(count, -1)
        columns = best.indices.masked_fill(best.values == -torch.inf, -1)[:, :, None]
        return {"pilots": pilots, "columns": columns}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        pilots, columns = choice["pilots"], choice["columns"]
        tally.settled["columns"] = columns.shape[3]
        rows.add(_unique(pilots), None)
        is_pilot = torch.zeros(pilots.shape[0], call.n_queries, dtype=torch.bool)
        is_pilot = is_pilot.to(pilots.device).scatter(1, pilots[:, 0, 0], True)
        own = runs(call.n_queries, 256, pilots.device)
        own = own.masked_fill(take(is_pilot[:, None, :, None], own)[..., 0], -1)
        there = (columns >= 0)[..., None]  # [B, H, 1, d, 1]
        values = rows.values(columns)
        means = []
        for part in own.split(4, 2):
            logits = rows.logits(part, columns)
            rows.count(part, logits)
            rows.add_scored(part, logits, values)
            finite = logits.masked_fill(logits == -torch.inf, 0.0)
            means.append(finite.sum(-1) / there.sum((3, 4))[..., None].clamp(min=1))
        lse, mean = rows.lse(), torch.cat(means, 2)

        valid, value = rows.mask.key_valid, rows.value
        length = torch.full_like(mean, call.n_keys)
        if valid is not None:
            value = value * valid[:, None, :, None]
            length = length * 0 + valid.sum(1)[:, None, None, None]
        others = length - there.sum((3, 4))[..., None]
        left = value.sum(2, keepdim=True)[:, :, None] - (values * there).sum(3, keepdim=True)
        peak = mean.masked_fill(others <= 0, -torch.inf)
        rows.add_part(own, peak, others, left.expand(*mean.shape, -1))
        return rows.output(), lse


def _unique(rows: Tensor) -> Tensor:
    """Positions with repeats replaced by -1, for those are drawn with replacement."""
    ordered = rows.sort(-1).values
    again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return ordered.masked_fill(again, -1)
