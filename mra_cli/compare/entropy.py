"""Rows by how spread their exact attention is."""

from __future__ import annotations

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.compare.report import ENTROPY_EDGES
from mra_cli.methods.rows import SoftmaxRows, Tally, runs


def entropy_bins(call: AttentionCall) -> Tensor:
    """The bin of `ENTROPY_EDGES` that each row falls in, int64 ``[B, H, N]``; -1 for padding."""
    rows, found = SoftmaxRows(call, Tally()), []
    for part in runs(call.n_queries, 128, call.query.device).split(1, 2):
        logs = rows.logits(part, None)[:, :, 0].log_softmax(-1)
        found.append(-(logs.exp() * logs).nan_to_num(0.0).sum(-1))
    entropy = torch.cat(found, 2)[:, :, : call.n_queries]
    most = rows.mask.legal_per_row().clamp(min=2).log()[:, None].to(entropy)
    inner = torch.tensor(ENTROPY_EDGES[:-1]).to(entropy)
    bins = torch.searchsorted(inner, (entropy / most).contiguous())
    return bins.masked_fill(~call.valid_rows[:, None], -1)


def squared_sums(rows: Tensor, bins: Tensor) -> Tensor:
    """Squared norms of rows ``[B, H, N, Dv]`` summed over each bin, float64 ``[bins]``."""
    sums = torch.zeros(len(ENTROPY_EDGES) + 1, dtype=torch.float64)
    squares = rows.double().square().sum(-1).flatten().cpu()
    return sums.scatter_add(0, (bins + 1).flatten().cpu(), squares)[1:]
