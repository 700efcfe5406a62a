"""Exact attention with all a mask can say, in O(N) memory: the yardstick and the fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mra_kernels.masks import AttentionMask
from mra_kernels.scores import ScoreRule

_ROW_CHUNK = 256


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention, by torch's own `scaled_dot_product_attention` wherever it can say it.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, Hkv, M, D]``, Hkv dividing H.
        value: ``[B, Hkv, M, Dv]``.
        mask: Who may see whom; None: everyone.
        scaling: Factor on ``q . k``; None: ``D ** -0.5``.
        softcap: Soft-cap of the logits.
        sinks: Logits that only feed the denominator, ``[H]``.
        bias: Added to the logits, ``[B or 1, H or 1, N, M]``.

    Returns:
        ``[B, H, N, Dv]`` in the dtype of ``value``; rows that may see no key are zero, as in torch.
    """
    if softcap is not None or sinks is not None:
        rule = ScoreRule(_scaling(query, scaling), softcap, bias)
        return exact_with_lse(query, key, value, mask=mask, rule=rule, sinks=sinks)[0]
    scaling, width = _scaling(query, scaling), value.shape[-1]
    extras: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] > key.shape[1]}
    query, key, value = _same_width(query, key, value)
    if mask is None or mask.is_full:
        added = None if bias is None else bias.to(query.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=added, **extras)[
            ..., :width
        ]
    if mask.is_plain_causal and bias is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **extras)[
            ..., :width
        ]
    parts = []
    for first in range(0, query.shape[2], _ROW_CHUNK):
        last = min(first + _ROW_CHUNK, query.shape[2])
        lo, hi = _reach(mask, first, last)
        allowed = mask.rows(first, last)[:, None, :, lo:hi]
        if bias is not None:
            part = bias[:, :, first:last, lo:hi].to(query.dtype)
            allowed = part.masked_fill(~allowed, -torch.inf)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, first:last],
                key[:, :, lo:hi],
                value[:, :, lo:hi],
                attn_mask=allowed,
                **extras,
            )
        )
    return torch.cat(parts, dim=2)[..., :width]


def exact_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | None,
    rule: ScoreRule,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention and the log-sum-exp of its logits, sinks left out of the latter.

    Arguments as in `exact_attention`, half types computed in float32.

    Returns:
        Output ``[B, H, N, Dv]`` in the dtype of ``value`` and ``[B, H, N]`` in the dtype of the
        computation (-inf where a row may see no key).
    """
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    kv_heads = key.shape[1]
    grouped = query.to(dtype).unflatten(1, (kv_heads, -1))
    keys, values = key.to(dtype)[:, :, None].transpose(-1, -2), value.to(dtype)[:, :, None]
    mask = mask or AttentionMask.full(query.shape[2], key.shape[2], device=query.device)
    outputs, sums = [], []
    for first in range(0, query.shape[2], _ROW_CHUNK):
        last = min(first + _ROW_CHUNK, query.shape[2])
        lo, hi = _reach(mask, first, last)
        dots = (grouped[:, :, :, first:last] @ keys[..., lo:hi]).flatten(1, 2)
        bias = None if rule.bias is None else rule.bias[:, :, first:last, lo:hi].to(dtype)
        allowed = mask.rows(first, last)[:, None, :, lo:hi]
        logits = rule.logits(dots, bias).masked_fill(~allowed, -torch.inf)
        lse = logits.logsumexp(-1)
        norm = lse if sinks is None else torch.logaddexp(lse, sinks.to(dtype)[None, :, None])
        weights = torch.exp(logits - norm.masked_fill(norm == -torch.inf, 0.0)[..., None])
        outputs.append((weights.unflatten(1, (kv_heads, -1)) @ values[..., lo:hi, :]).flatten(1, 2))
        sums.append(lse)
    return torch.cat(outputs, dim=2).to(value.dtype), torch.cat(sums, dim=2)


def _scaling(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _same_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros appended to the last dimension: at unequal widths torch falls back to N x M memory."""
    widths = [tensor.shape[-1] for tensor in tensors]
    if len(set(widths)) == 1:
        return tensors  # padding by nothing would copy
    missing = [max(widths) - width for width in widths]
    return tuple(
        torch.nn.functional.pad(t, (0, more)) for t, more in zip(tensors, missing, strict=True)
    )


def _reach(mask: AttentionMask, first: int, last: int) -> tuple[int, int]:
    """The keys any of these rows may see; at least one, so that shapes stay regular."""
    start, stop = mask.start[:, first:last], mask.stop[:, first:last]
    seen = stop > start
    if not bool(seen.any()):
        return 0, 1
    return int(start[seen].min()), int(stop[seen].max())
