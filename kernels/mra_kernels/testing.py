"""Measuring sticks for tests: dense float64 formulas that share no block code with operators,
and inputs to try them on."""

from __future__ import annotations

import torch
from torch import Tensor

from mra_kernels.config import MraAttentionConfig
from mra_kernels.masks import AttentionMask
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import Selection


def make_qkv(
    seed: int,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    n: int = 50,
    m: int = 50,
    d: int = 8,
    dv: int = 8,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries ``[B, H, n, d]`` and keys ``[B, Hkv, m, d]`` (doubled, for peaked rows), and
    values ``[B, Hkv, m, dv]``.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        2 * normal(batch, heads, n, d),
        2 * normal(batch, kv_heads, m, d),
        normal(batch, kv_heads, m, dv),
    )


def dense_logits(
    query: Tensor, key: Tensor, mask: AttentionMask, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """All logits in float64 ``[B, H, N, M]`` and who is visible, bool ``[B, H, N, M]``."""
    query = query.double()
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.einsum("bhnd,bhmd->bhnm", query, key) * rule.scaling
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    if rule.bias is not None:
        logits = logits + rule.bias.double()
    return logits, mask.rows(0, mask.n_queries)[:, None].expand_as(logits)


def dense_softmax(
    logits: Tensor, visible: Tensor, value: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """``softmax(logits) @ value`` over visible entries; rows that see nothing come out as NaN."""
    value = value.double().repeat_interleave(logits.shape[1] // value.shape[1], dim=1)
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        extra = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, extra], -1).softmax(-1)[..., :-1] @ value
    return logits.softmax(-1) @ value


def dense_mra(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
    selection: Selection,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a selection means, entry by entry: every legal entry gets the logit of the pair that
    covers it (exact in fine pairs, that of the pooled tokens in coarse ones), then one softmax.

    Returns:
        Output ``[B, H, N, Dv]`` float64, and how many pairs cover each entry ``[B, H, N, M]``.
    """
    logits, visible = dense_logits(query, key, mask, rule)
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    n, m = mask.n_queries, mask.n_keys
    every_q = torch.ones(query.shape[0], n, dtype=torch.bool)
    every_k = torch.ones(query.shape[0], m, dtype=torch.bool)
    query_ok = every_q if mask.query_valid is None else every_q & mask.query_valid
    key_ok = every_k if mask.key_valid is None else every_k & mask.key_valid
    out = torch.full_like(logits, -torch.inf)
    covered = torch.zeros_like(logits, dtype=torch.int64)
    for pairs, exact in [(selection.fine, True), *((level, False) for level in selection.coarse)]:
        for flat, row, col in zip(
            pairs.head.tolist(), pairs.row.tolist(), pairs.col.tolist(), strict=True
        ):
            b, h = divmod(flat, heads)
            i = torch.arange(row * pairs.query_rows, min((row + 1) * pairs.query_rows, n))
            j = torch.arange(col * pairs.side, min((col + 1) * pairs.side, m))
            covered[b, h, i[:, None], j] += 1
            if exact:
                out[b, h, i[:, None], j] = logits[b, h, i[:, None], j]
                continue
            coarsest = config.query_rows or config.resolutions[0]
            start = row * pairs.query_rows // coarsest * coarsest
            whole = torch.arange(start, min(start + coarsest, n))
            alone = not query_ok[b, whole].any()
            real_i, real_j = i if alone else i[query_ok[b, i]], j[key_ok[b, j]]
            mean_k = _mean(key[b, h // group, real_j])
            pooled = config.coarse == "pooled"
            rows = _mean(query[b, h, real_i])[None] if pooled else query[b, h, i].double()
            dots = (rows @ mean_k) * rule.scaling
            if rule.softcap is not None:
                dots = rule.softcap * torch.tanh(dots / rule.softcap)
            if rule.bias is not None:
                bias = rule.bias.double()
                bias = bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0]
                block = bias[i[:, None], real_j].mean(1)
                dots = dots + (block.mean() if pooled else block)
            out[b, h, i[:, None], j] = dots[:, None].expand(len(i), len(j))
    return dense_softmax(out, visible & (covered > 0), value, sinks), covered


def _mean(rows: Tensor) -> Tensor:
    """Mean of ``[n, d]`` rows in float64; zeros of none."""
    return rows.double().sum(0) / max(1, len(rows))
