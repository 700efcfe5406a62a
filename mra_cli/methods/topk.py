"""The largest scores of each row: the oracle of sparse attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TopK(Approximation):
    """Softmax over the largest scores of each row.

    All scores are computed to find them, so it saves no time: no sparse method that keeps as many
    scores of each row catches more of the attention.

    Attributes:
        keys: Scores kept per row.
    """

    name: ClassVar[str] = "topk"
    about: ClassVar[About] = About(
        summary="the largest scores of each row; an oracle, which computes all to find them",
        source="AxFormer's hard attention, Nagarajan et al., arXiv 2010.03688",
        patterns=("NS", "CS", "NC", "CC"),
        cost="N^2",
    )

    keys: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys is not None and self.keys < 1:
            raise ValueError(f"keys must be at least 1, got {self.keys}")

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows = SoftmaxRows(call, tally)
        legal = rows.mask.legal_per_row()  # [B or 1, N]
        kept = (legal * self.budget).round() if self.keys is None else legal.clamp(max=self.keys)
        kept = kept.long().clamp(min=1)
        most, found = int(kept.max()), []
        place = torch.arange(most, device=kept.device)
        for first in range(0, call.n_queries, _ROWS_AT_ONCE):
            part = kept[:, None, first : first + _ROWS_AT_ONCE, None]
            where = torch.arange(first, first + part.shape[2], device=kept.device)
            best = rows.logits(where.view(1, 1, 1, -1), None)[:, :, 0].topk(most, -1).indices
            found.append(best.masked_fill(place >= part, -1).int())
        tally.products += call.query.shape[:3].numel() * call.n_keys * call.query.shape[3]
        return {"keys": torch.cat(found, 2)}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        for first in range(0, call.n_queries, _ROWS_AT_ONCE):
            best = choice["keys"][:, :, first : first + _ROWS_AT_ONCE].long()
            own = torch.arange(first, first + best.shape[2], device=best.device)[None, None, None]
            kept = torch.zeros(*best.shape[:3], call.n_keys + 1, dtype=torch.bool)
            kept = kept.to(best.device).scatter(3, best % (call.n_keys + 1), True)[..., :-1]

            def among(row: Tensor, key: Tensor, kept: Tensor = kept, first: int = first) -> Tensor:
                return kept[:, :, None, row.flatten() - first]

            rows.add(own, None, among)
        return rows.output(), rows.lse()
