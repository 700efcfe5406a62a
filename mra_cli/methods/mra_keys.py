"""Multi-resolution attention with blocks of queries by single keys: our recipe for checkpoints that
were not trained with MRA."""

from __future__ import annotations

from dataclasses import dataclass

from mra_cli.calls import AttentionCall, AttentionResult
from mra_cli.errors import InputError
from mra_cli.methods.base import About
from mra_cli.methods.mra import MraFamily
from mra_kernels import MraKeysConfig
from mra_kernels.api import Impl
from mra_kernels.keys import KeyChoice

_KEYS_ABOUT = About(
    summary="the best keys of a block of queries computed exactly, the rest at its mean query",
    source="after Zeng et al., ICML 2022, arXiv 2207.10284, and Vyas et al., arXiv 2007.04825",
    patterns=("NS", "CS", "NC", "CC"),
    cost="N^2 scores of a few features, then N x keys kept",
    looks_ahead=True,
)


@dataclass(frozen=True)
class MraKeys(MraFamily):
    """Blocks of queries by single keys."""

    config: MraKeysConfig
    impl: Impl = "auto"

    def with_budget(self, budget: float) -> MraKeys:
        """The same setting with another budget for all heads."""
        if self.config.head_budgets is not None:
            raise InputError(
                "head_budgets must stand alone, in a plan, and got a budget for all heads beside "
                "them; leave one out"
            )
        return super().with_budget(budget)

    @property
    def about(self) -> About:
        """What the method is, and can do."""
        return _KEYS_ABOUT

    def reason_for_exact(self, call: AttentionCall) -> str | None:
        """Why this call is better left exact (or has to be); None if it need not."""
        if call.mask is None:
            return "its heads have different masks"
        budgets, heads = self.config.head_budgets, call.query.shape[1]
        if budgets is not None and len(budgets) != heads:
            raise InputError(
                f"head_budgets must be {heads} numbers, one a head, got {len(budgets)}; "
                "name layers of so many heads, or leave it out"
            )
        least = 2 * self.config.rows
        for count, what in ((call.n_queries, "queries"), (call.n_keys, "keys")):
            if count < least:
                return f"{count} {what} are less than two blocks ({least})"
        return None

    def multiply_adds(self, call: AttentionCall, result: AttentionResult) -> int:
        """Exact entries; estimates; and, for each block, the keys it leaves behind."""
        plan = result.plan
        assert isinstance(plan, KeyChoice)
        exact, left, estimated = plan.counts
        width, value_width = call.query.shape[-1], call.value.shape[-1]
        tilted = self.config.tail == "tilted" and call.softcap is None
        of_tail = width + value_width + (width if tilted else 0)
        rank = min(self.config.rank, width)
        return exact * (width + value_width) + estimated * rank + left * of_tail
