"""Single keys (`MraKeysConfig`) as one operator of torch: six launches, and what was chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mra_kernels._triton import exporting, tuning
from mra_kernels._triton.exported import exported_key_facts, some_size
from mra_kernels._triton.keys_attention import attend_kernel, tail_kernel
from mra_kernels._triton.keys_choice import limit_kernel, open_kernel
from mra_kernels._triton.keys_estimate import STEPS, estimate_kernel
from mra_kernels._triton.keys_tables import key_facts, tables_of
from mra_kernels._triton.plan import bits_of
from mra_kernels._triton.pooling import pooled
from mra_kernels.config import MraKeysConfig
from mra_kernels.keys import KeyChoice
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import ScoreRule

CHUNK = 1024
"""Keys listed at a time: bounds the list of a block, whatever the length."""


@torch.library.custom_op("mra_kernels::keys_forward", mutates_args=())
def keys_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    features: list[Tensor],
    budgets: Tensor,
    tables: list[Tensor],
    key_valid: Tensor | None,
    counted: Tensor | None,
    rows: int,
    first_keys: int,
    tilted: bool,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention of blocks of ``rows`` queries that open single keys.

    Args:
        query, key, value: ``[B, H, N, D]``, ``[B, Hkv, M, D]``, ``[B, Hkv, M, Dv]``; features
            adjacent.
        sinks: ``[H]``.
        features: Of queries and keys, int8 ``[B, H, N, R]`` and ``[B, H, M, R]``, and nats that a
            product counts, float32 ``[B, H, blocks]``.
        budgets: See `KeyCosts.budgets`.
        tables, key_valid, counted: See `KeyTables`.

    Returns:
        Output ``[B, H, N, Dv]``; lse of opened keys, float32 ``[B, H, N]``; for ``G`` batch times
        heads, a bit per block and key, lowest first, int32 ``[G, blocks, ceil(M / 32)]``; whole
        keys at each distance, int32 ``[G, blocks, 128]``; below which of them all are opened, and
        how many there, int32 ``[G, blocks]``.
    """
    (batch, heads, n, width), (_, kv_heads, m, value_width) = query.shape, value.shape
    q, k, unit = features
    intervals, facts, first_key = tables
    flat, blocks, words = batch * heads, facts.shape[1], -(-m // 32)
    mask_step = int(facts.shape[0] > 1)
    means = pooled(query, None, None, counted, None, rows, rows, 0)[0]

    def made(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    zero, limits, quotas = made(flat, n), made(flat, blocks), made(flat, blocks)
    tallies, opened = made(flat, blocks, STEPS.value), made(flat, blocks, words)
    estimate = {"SIDE": rows, "RP": q.shape[-1], "BM": 64, "BN": 64, "num_warps": 4}
    tiles = -(-n // 64), flat
    tuning.launch(
        estimate_kernel, tiles,
        q, k, unit, facts, intervals, first_key, key_valid, counted, zero, tallies,
        heads, n, m, blocks, first_keys, mask_step, **estimate,
    )  # fmt: skip
    tuning.launch(
        limit_kernel, (flat,), tallies, facts, budgets, limits, quotas, heads, blocks, mask_step,
        SEGMENTS=1 if counted is None else 2, RB=64, num_warps=8,
    )  # fmt: skip
    tuning.launch(
        open_kernel, tiles,
        q, k, unit, zero, facts, intervals, first_key, key_valid, limits, quotas, opened,
        heads, n, m, blocks, words, first_keys, mask_step, **estimate,
    )  # fmt: skip

    def floats(*shape: int) -> Tensor:
        return made(*shape, dtype=torch.float32)

    peak, mass = floats(flat, blocks), floats(flat, blocks)
    weighted = floats(flat, blocks, value_width)
    mean_keys = floats(flat, blocks, width) if tilted else None
    shared = {
        "GROUP": heads // kv_heads, "D": width, "DP": tuning.padded(width), "DV": value_width,
        "DVP": tuning.padded(value_width), "TILTED": tilted, "CAPPED": softcap is not None,
        "PRECISION": tuning.precision(),
    }  # fmt: skip
    numbers = m, blocks, words, mask_step, scaling, softcap or 1.0
    cut = tuning.key_tiles("keys_tail", query, value)
    tuning.launch(
        tail_kernel, (-(-blocks // cut.rows), flat),
        means, key, value, opened, facts, key_valid, peak, mass, weighted, mean_keys,
        *key.stride()[:3], *value.stride()[:3], heads, *numbers,
        RB=cut.rows, BN=cut.keys, STAGES=cut.stages, **cut.options, **shared,
    )  # fmt: skip
    cut = tuning.key_tiles("keys_forward", query, value)
    output, lse = value.new_empty(batch, heads, n, value_width), floats(batch, heads, n)
    tuning.launch(
        attend_kernel, (blocks, flat),
        query, key, value, output, lse, opened, facts, intervals, means, peak, mass, weighted,
        mean_keys, sinks, made(flat * blocks, CHUNK + cut.keys),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        heads, n, *numbers,
        SIDE=rows, BN=cut.keys, CHUNK=CHUNK, STAGES=cut.stages, **cut.options, **shared,
    )  # fmt: skip
    return output, lse, opened, tallies, limits, quotas


@keys_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, features: list[Tensor],
    budgets: Tensor, tables: list[Tensor], *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, n, _), (m, value_width) = query.shape, value.shape[2:]
    flat, blocks = batch * heads, tables[1].shape[1]
    words = some_size() if exporting() else -(-m // 32)

    def whole(*shape: Any) -> Tensor:
        return query.new_empty(shape, dtype=torch.int32)

    return (
        value.new_empty(batch, heads, n, value_width),
        query.new_empty((batch, heads, n), dtype=torch.float32),
        whole(flat, blocks, words),
        whole(flat, blocks, STEPS.value),
        whole(flat, blocks),
        whole(flat, blocks),
    )


def keys_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, KeyChoice]:
    """See `mra_kernels._triton.mra_triton`; without gradients."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    prepared = exported_key_facts if exporting() else key_facts
    features, tables, budgets = prepared(query, key, mask, config, float(rule.scaling))
    output, lse, opened, tallies, limits, quotas = keys_forward(
        query,
        key,
        value,
        sinks,
        features,
        budgets,
        list(tables[:3]),
        tables.key_valid,
        tables.counted,
        config.rows,
        config.first_keys,
        config.tail == "tilted" and rule.softcap is None,
        float(rule.scaling),
        rule.softcap,
    )
    choice = _choice(opened, tallies, limits, quotas, mask, config.rows, query.shape[:2])
    return for_blind_rows(output, value, mask, sinks), lse, choice


def _choice(
    opened: Tensor,
    tallies: Tensor,
    limits: Tensor,
    quotas: Tensor,
    mask: AttentionMask,
    rows: int,
    heads: torch.Size,
) -> KeyChoice:
    """The choice as other implementations tell it, worked out when asked for."""

    def figures() -> tuple[Tensor, Tensor, int, int, int]:
        _, costs = tables_of(mask, rows)
        step = torch.arange(tallies.shape[-1], device=tallies.device)
        chosen = (tallies * (step < limits[..., None])).sum(-1) + quotas
        chosen = chosen.unflatten(0, heads)
        exact = costs.cut_entries[:, None] + chosen * costs.live[:, None]
        real = ~costs.padding[:, None]
        total = (costs.entries[:, None] * real).sum(-1).clamp(min=1)
        forced = (costs.cut_entries[:, None] * real).sum(-1) / total
        left = int((costs.whole_keys[:, None] - chosen).sum())
        legal = costs.entries.sum() * (heads[0] // len(costs.entries))
        estimated = heads[1] * int(legal)
        density = (exact * real).sum(-1) / total
        return density, forced.expand_as(density), int(exact.sum()), left, estimated

    return KeyChoice(rows, lambda: bits_of(opened, mask.n_keys).unflatten(0, heads), figures)
