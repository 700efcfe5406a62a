"""The value object that travels: one attention call of one site, and what a method makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mra_cli.caches import CachedBlocks
from mra_cli.errors import UnsupportedModelError
from mra_cli.host import LazyMask, read_mask
from mra_kernels import AttentionMask, ScoreRule, exact_attention, exact_with_lse

MOST_SPECIAL_TOKENS = 8
"""Class, distillation and register tokens that may stand before the patches of an image."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything that decides the output of an attention module at one call.

    Attributes:
        query: ``[B, H, N, D]``, after rotary embedding and cache update.
        key: ``[B, Hkv, M, D]``, not repeated for grouped queries.
        value: ``[B, Hkv, M, Dv]``.
        mask: Who may see whom; None if heads differ in it (then ``bias`` says it all).
        scaling: Factor on ``q . k``.
        softcap: Soft-cap of the logits, or None.
        sinks: Logits that only feed the denominator, ``[H]``, or None.
        bias: Added to the logits, ``[B or 1, H or 1, N, M]``, or None.
        grid: Rows and columns of the image whose tokens these are, or None.
        window: Keys a row can see at most, by the mask's window or chunk; None: no such.
        blocks: Block means kept beside the KV cache; None: no cache, or one that can't have them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    grid: tuple[int, int] | None = None
    window: int | None = None
    blocks: CachedBlocks | None = None

    @classmethod
    def from_host(
        cls,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        cross: bool,
        grid: tuple[int, int] | None,
        blocks: CachedBlocks | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> AttentionCall:
        """From the arguments of a transformers attention function.

        Args:
            cross: Keys come from another sequence, so their padding says nothing of the queries.
            blocks: Block means beside the cache that ``key`` and ``value`` come from.

        Raises:
            UnsupportedModelError: Dropout on the attention weights is asked for.
        """
        if dropout > 0.0 and module.training:
            raise UnsupportedModelError(
                f"attention dropout must be 0 while patched, got {dropout}; call model.eval(), or "
                "set the config's attention dropout to 0 to train"
            )
        n_keys = key.shape[2]
        mask, bias = read_mask(attention_mask, module, query, n_keys, is_causal, cross=cross)
        window = attention_mask.window if isinstance(attention_mask, LazyMask) else None
        if mask is not None and mask.n_keys < n_keys:
            n_keys = mask.n_keys
            key, value = key[:, :, :n_keys], value[:, :, :n_keys]
        if position_bias is not None:
            position_bias = position_bias[..., :n_keys]
            bias = position_bias if bias is None else position_bias + bias
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if grid is not None and not 0 <= n_keys - grid[0] * grid[1] <= MOST_SPECIAL_TOKENS:
            grid = None  # a picture of another size than the site was found with
        return cls(query, key, value, mask, scaling, softcap, s_aux, bias, grid, window, blocks)

    @property
    def n_queries(self) -> int:
        return self.query.shape[2]

    @property
    def n_keys(self) -> int:
        return self.key.shape[2]

    @property
    def valid_rows(self) -> Tensor:
        """Query rows that count: not padding, and seeing at least one key. Bool ``[B, N]``."""
        shape = (self.query.shape[0], self.n_queries)
        if self.mask is None:
            return torch.ones(shape, dtype=torch.bool, device=self.query.device)
        seen = (self.mask.legal_per_row() > 0).expand(shape)
        return seen if self.mask.query_valid is None else seen & self.mask.query_valid

    @property
    def legal_entries(self) -> int:
        """Score entries the mask allows, over the whole batch and all heads."""
        batch, heads = self.query.shape[:2]
        if self.mask is None:
            return batch * heads * self.n_queries * self.n_keys
        return heads * int(self.mask.legal_per_row().expand(batch, -1).sum())

    def first_heads(self, heads: int) -> AttentionCall:
        """The call of the first ``heads`` query heads alone, a multiple of those per key head."""
        kv_heads = heads * self.key.shape[1] // self.query.shape[1]
        bias = self.bias
        return replace(
            self,
            query=self.query[:, :heads],
            key=self.key[:, :kv_heads],
            value=self.value[:, :kv_heads],
            sinks=None if self.sinks is None else self.sinks[:heads],
            bias=bias if bias is None or bias.shape[1] == 1 else bias[:, :heads],
        )

    def exact(self) -> Tensor:
        """Exact attention ``[B, H, N, Dv]``."""
        return exact_attention(
            self.query,
            self.key,
            self.value,
            mask=self.mask,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            bias=self.bias,
        )

    def exact_lse(self) -> Tensor:
        """Log-sum-exp of the exact logits, sinks left out, ``[B, H, N]``."""
        rule = ScoreRule(self.scaling, self.softcap, self.bias)
        return exact_with_lse(self.query, self.key, self.value, mask=self.mask, rule=rule)[1]


class CallPlan(Protocol):
    """What a method chose to compute exactly in one call; worked out when asked."""

    @property
    def density(self) -> Tensor:
        """Fraction of the legal score entries computed exactly, ``[B, H]``."""

    @property
    def forced(self) -> Tensor:
        """The part of the density that the budget had no say in, ``[B, H]``."""


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """What a method made of a call.

    Attributes:
        output: ``[B, H, N, Dv]``.
        lse: Log-sum-exp of the exactly computed logits, ``[B, H, N]``.
        impl: The implementation that ran.
        plan: What was chosen; the method itself may know more of it than a `CallPlan` says.
    """

    output: Tensor
    lse: Tensor
    impl: str
    plan: CallPlan

    @property
    def density(self) -> Tensor:
        """Fraction of the legal score entries computed exactly, ``[B, H]``."""
        return self.plan.density

    @property
    def forced(self) -> Tensor:
        """The part of the density that the budget had no say in, ``[B, H]``."""
        return self.plan.forced
