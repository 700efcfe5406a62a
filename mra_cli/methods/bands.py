"""Keys near a row's own position, as blocks of rows with the keys in their reach."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import knob_for
from mra_cli.methods.rows import groups
from mra_kernels import AttentionMask


@dataclass(frozen=True, eq=False)
class Band:
    """The keys at most ``half`` positions from each row.

    Attributes:
        half: That many.
        rows, keys: Groups of rows, and of the keys in their reach, as in `SoftmaxRows.add`.
        offset: Position of row 0 among the keys.
    """

    half: int
    rows: Tensor
    keys: Tensor
    offset: int

    @classmethod
    def of(cls, call: AttentionCall, half: int) -> Band:
        """The band of a call whose queries and keys are one sequence."""
        mask = call.mask
        assert mask is not None
        half = min(half, call.n_keys)
        size = max(16, min(64, half // 2))
        rows = groups(call.n_queries, size, call.query.device)
        after = 0 if mask.is_causal else half
        first = torch.arange(rows.shape[2], device=rows.device) * size + mask.query_offset - half
        keys = first[:, None] + torch.arange(half + size + after, device=rows.device)
        keys = keys.masked_fill((keys < 0) | (keys >= call.n_keys), -1)
        return cls(half, rows, keys[None, None], mask.query_offset)

    def keep(self, row: Tensor, key: Tensor) -> Tensor:
        """Which pairs are near enough."""
        return (row + self.offset - key).abs() <= self.half


def half_width(mask: AttentionMask, entries: float) -> int:
    """The half width of the band that holds as near as can be so many legal entries (of one head,
    over the batch of the mask); kept for the next call with this mask."""
    own = torch.arange(mask.n_queries, device=mask.start.device) + mask.query_offset

    def inside(half: int) -> float:
        start = torch.maximum(mask.start, own - half)
        stop = torch.minimum(mask.stop, own + half + 1)
        band = replace(mask, start=start, stop=torch.maximum(start, stop))
        return float(band.legal_per_row().sum())

    def found() -> int:
        widest = max(mask.n_keys, mask.n_queries)
        return widest if inside(widest) <= entries else knob_for(entries, inside, widest)

    return mask.kept(("half_width", entries), found)
