"""Rows of attention matrices, exact and approximated: what `AttentionCall` never writes out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods import Method
from mra_kernels import ScoreRule

_COLUMNS = 512
"""Columns of an approximated matrix that are computed at once: bounds its memory."""


def legal_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Who may see whom, bool ``[B or 1, 1, R, M]``.

    Args:
        rows: Query rows, int64 ``[R]``.
    """
    if call.mask is None:
        shape = (1, 1, len(rows), call.n_keys)
        return torch.ones(shape, dtype=torch.bool, device=call.query.device)
    return torch.cat([call.mask.rows(row, row + 1) for row in rows.tolist()], 1)[:, None]


def exact_rows(call: AttentionCall, rows: Tensor) -> Tensor:
    """Rows of the exact attention matrix in float64, ``[B, H, R, M]``; sinks take their share."""
    query, key = call.query[:, :, rows].double(), call.key.double()
    groups = query.shape[1] // key.shape[1]
    dots = query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    bias = None if call.bias is None else call.bias[:, :, rows].double()
    logits = ScoreRule(call.scaling, call.softcap).logits(dots, bias)
    logits = logits.masked_fill(~legal_rows(call, rows), -torch.inf)
    norm = logits.logsumexp(-1, keepdim=True)
    if call.sinks is not None:
        norm = torch.logaddexp(norm, call.sinks.double()[None, :, None, None])
    return torch.exp(logits - norm.masked_fill(norm == -torch.inf, 0.0))


def approximated_rows(method: Method, call: AttentionCall, rows: Tensor) -> Tensor:
    """Rows of the attention matrix that a method stands for, ``[B, H, R, M]`` in float64.

    A method's output is linear in the values, so values that are columns of the identity give it
    column by column: what the method really does, in the dtype of the call.
    """
    batch, kv_heads, n_keys = call.key.shape[:3]
    parts = []
    for first in range(0, n_keys, _COLUMNS):
        columns = torch.eye(n_keys, dtype=call.value.dtype, device=call.value.device)
        columns = columns[:, first : first + _COLUMNS].expand(batch, kv_heads, -1, -1)
        result = method(replace(call, value=columns.contiguous(), blocks=None))
        parts.append(result.output[:, :, rows].double())
    return torch.cat(parts, -1)
