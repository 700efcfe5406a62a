"""Multi-resolution attention (Zeng et al., ICML 2022, arXiv 2207.10284)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_kernels import MraAttentionConfig, mra_attention, native

_LONG_CACHE = 2048
"""Keys from which on choosing blocks pays for a single query (README, 'Decoding')."""


@dataclass(frozen=True)
class Mra:
    """MRA at one setting: ``mra2`` and ``mra2s`` are the paper's, ``mra`` is our own recipe.

    Attributes:
        name: Name of the preset the setting started from.
        config: The operator.
    """

    name: str
    config: MraAttentionConfig

    @property
    def budget(self) -> float:
        """Fraction of the legal score entries that may be exact."""
        return self.config.budget

    def with_budget(self, budget: float) -> Mra:
        """The same setting with another budget."""
        try:
            return dataclasses.replace(self, config=dataclasses.replace(self.config, budget=budget))
        except ValueError as error:
            raise InputError(str(error)) from error

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call is better left exact (or has to be); None if it need not."""
        if call.mask is None:
            return "its heads have different masks"
        least = 2 * self.config.resolutions[0]
        if call.n_queries < least:
            return self._reason_against_decoding(call, least)
        if call.n_keys < least:
            return f"{call.n_keys} keys are less than two blocks ({least})"
        return None

    def _reason_against_decoding(self, call: AttentionCall, least: int) -> str | None:
        if call.blocks is None:
            return f"{call.n_queries} queries are less than two blocks ({least})"
        if call.n_keys < _LONG_CACHE:
            return f"{call.n_keys} cached keys are read faster than chosen from ({_LONG_CACHE})"
        return native.reason_against(call.query, call.key, call.sinks, call.bias, mask=call.mask)

    def settings(self) -> dict[str, Any]:
        """Name, budget and changed settings, JSON types only."""
        fields = dataclasses.asdict(self.config)
        del fields["grid"], fields["blocks_per_row"]  # the site's; another way to say budget
        return {
            "method": self.name,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
        }

    def __call__(self, call: AttentionCall) -> AttentionResult:
        config = self.config
        if call.grid is not None and _is_plain_image(call):
            config = dataclasses.replace(config, grid=call.grid)
        pyramid = None
        if call.blocks is not None and call.n_queries < 2 * config.resolutions[0]:
            # In a prompt the mask cuts through each row's own block, which is exact for that.
            config = dataclasses.replace(config, diagonal_blocks=max(1, config.diagonal_blocks))
            valid = None if call.mask is None else call.mask.key_valid
            pyramid = call.blocks.pyramid(config.resolutions[:-1], call.key, call.value, valid)
        result = mra_attention(
            call.query,
            call.key,
            call.value,
            config=config,
            mask=call.mask,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
            bias=call.bias,
            pyramid=pyramid,
        )
        selection = result.selection
        return AttentionResult(result.output, selection.density, selection.forced, result.lse)


def _is_plain_image(call: AttentionCall) -> bool:
    mask = call.mask
    return mask is not None and mask.is_full and call.bias is None
