"""Informer's ProbSparse attention: exact rows where attention is peaked, means elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice
from mra_cli.methods.rows import SoftmaxRows, Tally
from mra_kernels import AttentionMask


@dataclass(frozen=True)
class ProbSparse(Approximation):
    """The rows whose scores of some random keys stand out are computed exactly, all others get the
    mean of the values they may see (Zhou et al., AAAI 2021, arXiv 2012.07436).

    As in the authors' code, the mean that a row's largest sampled score is compared with is the sum
    over the sample divided by the number of all keys.

    Attributes:
        rows: Rows computed exactly.
        factor: Random keys scored per row are ``factor * ceil(ln M)``.
        seed: Of the random keys.
    """

    name: ClassVar[str] = "probsparse"
    about: ClassVar[About] = About(
        summary="the most peaked rows exactly, the mean of the values elsewhere",
        source="Informer: Zhou et al., AAAI 2021, arXiv 2012.07436",
        patterns=("NS", "CS", "NC"),
        cost="N x (rows + log N)",
        looks_ahead=True,
        honours=("bias", "soft-cap"),
    )

    rows: int | None = None
    factor: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows = SoftmaxRows(call, tally)
        sample = min(call.n_keys, self.factor * math.ceil(math.log(max(2, call.n_keys))))
        wanted = max(1, round(self.budget * call.n_queries)) if self.rows is None else self.rows
        generator = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(1, call.n_queries, sample, generator=generator, dtype=torch.float64)
        legal = rows.mask.legal_per_row()[..., None]  # [B or 1, N, 1]
        kth = (luck.to(legal.device) * legal).long()  # of the keys that the row may see
        keys = _kth_visible(rows.mask, kth)
        keys = keys.masked_fill(legal == 0, -1)[:, None]
        own = torch.arange(call.n_queries, device=keys.device)[None, None, :, None]
        with torch.no_grad():
            scores = torch.cat(
                [
                    rows.logits(own[:, :, first : first + 256], keys[:, :, first : first + 256])
                    for first in range(0, call.n_queries, 256)
                ],
                2,
            )[:, :, :, 0]
        tally.products += scores.numel() * call.query.shape[3]
        known = scores.masked_fill(scores == -torch.inf, 0.0)
        valid = rows.mask.key_valid
        length = call.n_keys if valid is None else valid.sum(1)[:, None, None]
        peaked = scores.amax(-1) - known.sum(-1) / length
        peaked = peaked.masked_fill(~call.valid_rows[:, None], -torch.inf)
        best = peaked.topk(min(wanted, call.n_queries), -1)
        return {"rows": best.indices.masked_fill(best.values == -torch.inf, -1)[:, :, None]}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        tally.settled["rows"] = choice["rows"].shape[3]
        rows.add(choice["rows"], None)
        return rows.output(), rows.lse()  # rows without a score get the mean


def _kth_visible(mask: AttentionMask, kth: Tensor) -> Tensor:
    """Positions of the ``kth`` ``[B or 1, N, U]`` keys, from 0, that each row may see."""
    if mask.dense is not None:
        seen = mask.rows(0, mask.n_queries).long().cumsum(-1)
        return torch.searchsorted(seen, (kth + 1).expand(len(seen), -1, -1).contiguous())
    before = mask.real_before
    if before is None:
        return kth + mask.start[..., None]
    start = before.gather(1, mask.start.expand(len(before), -1))
    wanted = (start[..., None] + kth + 1).flatten(1)
    return torch.searchsorted(before[:, 1:].contiguous(), wanted).unflatten(1, kth.shape[1:])
