"""Keys clustered by content, in the manner of ClusTR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice, exact_products, knob_for
from mra_cli.methods.rows import SoftmaxRows, Tally, groups


@dataclass(frozen=True)
class ClusterKV(Approximation):
    """Queries attend to clusters of keys: mean key, mean value, and the logarithm of how many they
    are (after Xie et al., "ClusTR", arXiv 2208.13138).

    Lloyd's k-means on the keys of each head, from evenly spread keys; nothing is random.

    Attributes:
        clusters: Clusters per head.
        iterations: Rounds of k-means.
    """

    name: ClassVar[str] = "cluster-kv"
    about: ClassVar[About] = About(
        summary="keys and values averaged over clusters of similar keys",
        source="after ClusTR, Xie et al., arXiv 2208.13138",
        patterns=("NS", "NC", "CC"),
        cost="N x clusters x (iterations + 1)",
        budgets="multiply-adds",
        masks="padding",
        honours=("soft-cap", "sinks"),
        adapted="k-means and log(count) in place of a trained model's density peaks",
    )

    clusters: int | None = None
    iterations: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters must be at least 1, got {self.clusters}")
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {self.iterations}")

    def count(self, call: AttentionCall) -> int:
        """Clusters: the setting, or what the budget allows."""
        if self.clusters is not None:
            return min(self.clusters, call.n_keys)
        batch, heads, n, d = call.query.shape
        grouping = (self.iterations + 1) * call.n_keys * d
        each = batch * heads * (n * (d + call.value.shape[3]) + grouping)
        return knob_for(self.budget * exact_products(call), lambda c: float(c * each), call.n_keys)

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        rows = SoftmaxRows(call, tally)
        key, valid = rows.key, rows.mask.key_valid
        count, n_keys = self.count(call), call.n_keys
        real = key.new_ones(1, n_keys) if valid is None else valid.to(key.dtype)
        length = real.sum(1, keepdim=True)
        spread = torch.arange(count, device=key.device) * length / count
        seeds = torch.searchsorted(real.cumsum(1).contiguous(), spread.floor() + 1)
        centres = key.gather(
            2,
            seeds.clamp(max=n_keys - 1)[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3]),
        )
        with torch.no_grad():
            for left in range(self.iterations, -1, -1):
                scores = key @ centres.transpose(2, 3) - centres.square().sum(-1)[:, :, None] / 2
                tally.products += key.numel() * count
                cluster = scores.argmax(-1).masked_fill(real[:, None] == 0, count)
                if left:
                    means, sizes = _cluster_means(key, cluster, count)
                    centres = torch.where(sizes[..., None] > 0, means, centres)
        return {"cluster": cluster}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        count = self.count(call)
        tally.settled["clusters"] = count
        key, sizes = _cluster_means(rows.key, choice["cluster"], count)
        value, _ = _cluster_means(rows.value, choice["cluster"], count)
        logits = rows.rule.logits(rows.query @ key.transpose(2, 3)) + sizes.log()[:, :, None]
        lse = rows.lse()
        own = groups(call.n_queries, call.n_queries, key.device)
        rows.add_scored(own, logits[:, :, None], value[:, :, None])
        return rows.output(), lse


def _cluster_means(tokens: Tensor, cluster: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means ``[B, H, count, D]`` and sizes of clusters; cluster ``count`` is left out."""
    sums = tokens.new_zeros(*tokens.shape[:2], count + 1, tokens.shape[3])
    sums = sums.scatter_add(2, cluster[..., None].expand_as(tokens), tokens)[:, :, :count]
    ones = torch.ones_like(cluster, dtype=tokens.dtype)
    sizes = tokens.new_zeros(*tokens.shape[:2], count + 1).scatter_add(2, cluster, ones)[
        ..., :count
    ]
    return sums / sizes.clamp(min=1)[..., None], sizes
