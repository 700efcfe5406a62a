"""Multi-resolution attention (Zeng et al., ICML 2022, arXiv 2207.10284)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_cli.methods.base import About, knobs_of
from mra_kernels import (
    KeyPyramid,
    MraAttentionConfig,
    MraKeysConfig,
    MraResult,
    mra_attention,
    reason_against,
)
from mra_kernels.api import Impl
from mra_kernels.keys import KeyChoice
from mra_kernels.selection import Selection

F = TypeVar("F", bound="MraFamily")

_LONG_CACHE = 1 << 22
"""Numbers in a KV cache from which on choosing blocks pays for a new token, with two levels: about
4096 keys of 8 heads of 64, or 11 000 of 3 (`mra-cli bench --decode`). Smaller final blocks, of
three levels, are read in smaller pieces, which pays from twice as many on."""

_NOT_KNOBS = ("budget", "blocks_per_row", "grid")  # said by --budget, or by the site

_ABOUT = About(
    summary="blocks scored at low resolution, the best of them computed exactly",
    source="Zeng et al., ICML 2022, arXiv 2207.10284",
    patterns=("NS", "CS", "NC", "CC"),
    cost="N^2 / block^2 pooled scores, then N x keys kept",
    looks_ahead=True,
)


@dataclass(frozen=True)
class MraFamily(ABC):
    """What methods whose settings are a config of `mra_kernels` have in common.

    Attributes:
        name: Name of the preset the setting started from.
        config: The operator.
        impl: Which implementation of it runs, see `mra_kernels.mra_attention`.
    """

    name: str
    config: Any
    impl: Impl = "auto"

    @property
    def budget(self) -> float:
        """Fraction of the legal score entries that may be exact."""
        return self.config.budget

    def with_budget(self: F, budget: float) -> F:
        """The same setting with another budget."""
        try:
            return dataclasses.replace(self, config=dataclasses.replace(self.config, budget=budget))
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    @abstractmethod
    def about(self) -> About:
        """What the method is, and can do."""

    @property
    def knobs(self) -> Mapping[str, Any]:
        """Settings beside the budget, and their types."""
        return knobs_of(type(self.config), _NOT_KNOBS)

    def with_settings(self: F, changes: Mapping[str, Any]) -> F:
        """The same method with these knobs turned."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def at(self: F, site: str) -> F:
        """The same everywhere."""
        return self

    def reason_against_model(self, fingerprint: str) -> str | None:
        """Nothing here was fitted to one model."""
        return None

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed at all; None if it can."""
        return "its heads have different masks" if call.mask is None else None

    def settings(self) -> dict[str, Any]:
        """Name, budget and changed settings, JSON types only."""
        values = {key: getattr(self.config, key) for key in ("budget", *self.knobs)}
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"method": self.name, **listed}

    def in_float64(self, call: AttentionCall, result: AttentionResult, heads: int) -> Tensor:
        """The specification in float64, on the blocks or keys that were chosen."""
        plan = result.plan
        assert isinstance(plan, (Selection, KeyChoice))
        part = _double(call.first_heads(heads))
        return self._attend(part, "reference", plan.first_heads(heads)).output

    def __call__(self, call: AttentionCall) -> AttentionResult:
        result = self._attend(call, self.impl, None)
        return AttentionResult(result.output, result.lse, result.impl, result.selection)

    def _attend(
        self,
        call: AttentionCall,
        impl: Impl,
        plan: Selection | KeyChoice | None,
        config: MraAttentionConfig | MraKeysConfig | None = None,
        pyramid: KeyPyramid | None = None,
    ) -> MraResult:
        config = config or self.config
        if call.grid is not None and _is_plain_image(call):
            config = dataclasses.replace(config, grid=call.grid)
        return mra_attention(
            call.query,
            call.key,
            call.value,
            config=config,
            mask=call.mask,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
            bias=call.bias,
            impl=impl,
            selection=plan,
            pyramid=pyramid,
        )


@dataclass(frozen=True)
class Mra(MraFamily):
    """Blocks at several resolutions: ``mra2`` and ``mra2s`` are the paper's."""

    config: MraAttentionConfig
    impl: Impl = "auto"

    @property
    def about(self) -> About:
        """What the method is, and can do."""
        return _ABOUT

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call is better left exact (or has to be); None if it need not."""
        if call.mask is None:
            return "its heads have different masks"
        queries, keys = (2 * length for length in self.config.block_shapes[0])
        if call.n_queries < queries:
            return self._reason_against_decoding(call, queries)
        if call.n_keys < keys:
            return f"{call.n_keys} keys are less than two blocks ({keys})"
        return None

    def _reason_against_decoding(self, call: AttentionCall, least: int) -> str | None:
        if call.blocks is None:
            return f"{call.n_queries} queries are less than two blocks ({least})"
        if self.impl == "reference":
            return "plain torch reads a cache faster than it chooses from it"
        least_cached = _LONG_CACHE * (1 if len(self.config.resolutions) == 2 else 2)
        cached = call.key.numel() + call.value.numel()
        if cached < least_cached:
            return (
                f"a cache of {cached / 1e6:.1f} million numbers is read faster than chosen from "
                f"(it pays from {least_cached / 1e6:.0f} million on)"
            )
        fast = "native" if call.query.device.type == "cpu" else "triton"
        given = call.query, call.key, call.value, call.sinks
        return reason_against(fast, *given, mask=call.mask, config=self.config, bias=call.bias)

    def multiply_adds(self, call: AttentionCall, result: AttentionResult) -> int:
        """A dot product and a weighted value per score evaluated, pooled or exact. A few per cent
        too many: pooled scores of blocks that are opened weigh no value."""
        plan = result.plan
        assert isinstance(plan, Selection)
        return plan.dot_products * (call.query.shape[-1] + call.value.shape[-1])

    def __call__(self, call: AttentionCall) -> AttentionResult:
        config, pyramid = self.config, None
        if call.blocks is not None and call.n_queries < 2 * config.block_shapes[0][0]:
            # In a prompt the mask cuts through each row's own block, which is exact for that.
            config = dataclasses.replace(config, diagonal_blocks=max(1, config.diagonal_blocks))
            valid = None if call.mask is None else call.mask.key_valid
            if self.impl != "reference":
                sides = config.resolutions[:-1]
                pyramid = call.blocks.pyramid(sides, call.key, call.value, valid)
        result = self._attend(call, self.impl, None, config, pyramid)
        return AttentionResult(result.output, result.lse, result.impl, result.selection)


def _double(call: AttentionCall) -> AttentionCall:
    names = ("query", "key", "value", "sinks", "bias")
    wide = {name: getattr(call, name) for name in names}
    return dataclasses.replace(
        call, **{name: x.double() for name, x in wide.items() if x is not None}
    )


def _is_plain_image(call: AttentionCall) -> bool:
    mask = call.mask
    return mask is not None and mask.is_full and call.bias is None
