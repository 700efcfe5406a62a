"""Frozen descriptions of the MRA attention operators."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Coarse = Literal["pooled", "per_query", "none"]
Score = Literal["row", "mu"]
Scope = Literal["head", "row"]
Tail = Literal["tilted", "pooled"]


@dataclass(frozen=True)
class MraAttentionConfig:
    """Multi-resolution attention (Zeng et al., "Multi Resolution Analysis (MRA) for Approximate
    Self-Attention", ICML 2022, arXiv 2207.10284).

    Attention scores are pooled over blocks of ``resolutions[0]`` x ``resolutions[0]`` entries; the
    best blocks are opened and rescored at the next resolution, and so on. What is opened at the
    last step is computed exactly, what is left behind keeps its pooled score.

    Attributes:
        resolutions: Block sides from coarse to fine, each dividing the one before; the last is 1.
            ``(32, 1)`` is the paper's MRA-2, ``(16, 4, 1)`` a three-level analysis.
        budget: Fraction in (0, 1] of the legal (unmasked) score entries that may be exact.
        blocks_per_row: Alternative to ``budget``: coarse blocks opened per row of blocks (the
            paper's ``block_per_row``). Two-level resolutions only.
        coarse: What a block that is not opened contributes. ``pooled``: one score per block, from
            the mean query and the mean key (the paper). ``per_query``: one score per query row,
            from the row's own query and the mean key. ``none``: nothing (MRA-2-s).
        score: What blocks are ranked by. ``row``: pooled logit minus the best of its row of blocks
            (the authors' code). ``mu``: the pooled logit itself (the paper's text).
        scope: Where blocks compete: ``head`` (the whole head, as in the paper) or ``row`` (each
            row of blocks gets its own share of the budget).
        first_blocks: Prior: this many first rows and columns of blocks go first, at every step.
        diagonal_blocks: Prior: a band of this many block diagonals goes first (1: the main one).
        query_rows: Queries per block, a multiple of ``resolutions[0]``, which stays the number of
            keys; None: as many. Their mean stands for all of them, and all read the same keys: 64
            and 128 are what GPUs like. Two-level resolutions only.
        grid: Height and width in tokens of an image whose tokens are the last ``height * width``
            of the sequence. Tokens are then regrouped so that a block is a patch of the image.

    Raises:
        ValueError: A field is out of its range.
    """

    resolutions: tuple[int, ...] = (32, 1)
    budget: float = 0.25
    blocks_per_row: int | None = None
    coarse: Coarse = "pooled"
    score: Score = "row"
    scope: Scope = "head"
    first_blocks: int = 0
    diagonal_blocks: int = 0
    query_rows: int | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sides = self.resolutions
        divides = all(a > b >= 1 and a % b == 0 for a, b in pairwise(sides))
        if len(sides) < 2 or sides[-1] != 1 or not divides:
            raise ValueError(
                "resolutions must go from coarse to fine, each dividing the one before, and end "
                f"in 1, like (32, 1) or (16, 4, 1); got {sides}"
            )
        _check_budget(self.budget)
        if self.blocks_per_row is not None and (self.blocks_per_row < 1 or len(sides) != 2):
            raise ValueError(
                "blocks_per_row must be at least 1 and needs two resolutions like (32, 1); got "
                f"blocks_per_row={self.blocks_per_row} with resolutions={sides}; use budget instead"
            )
        rows = self.query_rows
        if rows is not None and (rows < sides[0] or rows % sides[0] or len(sides) != 2):
            raise ValueError(
                "query_rows must be a multiple of the block side and needs two resolutions like "
                f"(32, 1); got query_rows={rows} with resolutions={sides}"
            )
        for name, kind in (("coarse", Coarse), ("score", Score), ("scope", Scope)):
            if getattr(self, name) not in get_args(kind):
                expected = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {expected}; got {getattr(self, name)!r}")
        for name in ("first_blocks", "diagonal_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        _check_grid(self.grid)

    @property
    def block_shapes(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys per block at every step, from coarse to fine."""
        return tuple((self.query_rows or side, side) for side in self.resolutions[:-1])

    def area(self, step: int) -> float:
        """Fraction of the legal entries that step ``step`` (0: the coarsest) may open.

        Areas shrink geometrically down to ``budget`` at the last step.
        """
        return float(self.budget ** ((step + 1) / (len(self.resolutions) - 1)))


@dataclass(frozen=True)
class MraKeysConfig:
    """Multi-resolution attention over blocks of ``rows`` queries by a single key, for checkpoints
    that were not trained with it.

    A block of queries opens single keys: those that matter most to any one of its queries, as far
    as a few features of queries and keys tell. The keys it leaves behind stay at the low
    resolution, at the score of its mean query (`MraAttentionConfig`'s ``pooled``, with blocks that
    are not square), which the clustered attention of Vyas et al. (arXiv 2007.04825) does to
    clusters of queries, too; ``tilted`` corrects that for each query to first order.

    Attributes:
        rows: Queries per block.
        budget: Fraction in (0, 1] of the legal (unmasked) score entries that may be exact.
        rank: Features, of those that carry most of ``query . key``, from which scores are
            estimated, a byte each; at ``head_dim`` and above none is left out.
        tail: What keys left behind contribute. ``pooled``: one score for all queries of a block.
            ``tilted``: their log-sum-exp at the mean query, and its gradient times a query's
            distance from the mean; with a soft-cap, like ``pooled``.
        first_keys: Prior: so many first keys go first.
        head_budgets: A budget for each query head instead of the same for all.
        grid: As in `MraAttentionConfig`.

    Raises:
        ValueError: A field is out of its range.
    """

    rows: int = 16
    budget: float = 0.25
    rank: int = 24
    tail: Tail = "tilted"
    first_keys: int = 16
    head_budgets: tuple[float, ...] | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.first_keys < 0:
            raise ValueError(f"first_keys must be at least 0, got {self.first_keys}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}; got {self.tail!r}")
        for budget in (self.budget, *(self.head_budgets or ())):
            _check_budget(budget)
        _check_grid(self.grid)

    def budget_of_heads(self, heads: int) -> tuple[float, ...]:
        """The budget of each query head.

        Raises:
            ValueError: ``head_budgets`` are for another number of heads.
        """
        budgets = self.head_budgets or (self.budget,) * heads
        if len(budgets) != heads:
            raise ValueError(
                f"head_budgets must be {heads} numbers, one a head, got {len(budgets)}"
            )
        return budgets


def _check_budget(budget: float) -> None:
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget must be in (0, 1], got {budget}")


def _check_grid(grid: tuple[int, int] | None) -> None:
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise ValueError(f"grid must be (height, width) in tokens, got {grid}")


PRESETS: dict[str, MraAttentionConfig | MraKeysConfig] = {
    "mra": MraKeysConfig(),
    "mra2": MraAttentionConfig(),
    "mra2s": MraAttentionConfig(coarse="none"),
    "mra3": MraAttentionConfig(resolutions=(16, 4, 1), coarse="per_query", first_blocks=1),
}
"""Named starting points: our recipe for checkpoints as they are; the paper's MRA-2 and MRA-2-s; and
a three-level analysis whose budget goes to the first tokens first, on which pretrained models park
attention (README, 'Methods')."""
