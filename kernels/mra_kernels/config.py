"""The one frozen description of an MRA attention operator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Coarse = Literal["pooled", "per_query", "none"]
Score = Literal["row", "mu"]
Scope = Literal["head", "row"]


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
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sides = self.resolutions
        divides = all(a > b >= 1 and a % b == 0 for a, b in pairwise(sides))
        if len(sides) < 2 or sides[-1] != 1 or not divides:
            raise ValueError(
                "resolutions must go from coarse to fine, each dividing the one before, and end "
                f"in 1, like (32, 1) or (16, 4, 1); got {sides}"
            )
        if not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget must be in (0, 1], got {self.budget}")
        if self.blocks_per_row is not None and (self.blocks_per_row < 1 or len(sides) != 2):
            raise ValueError(
                "blocks_per_row must be at least 1 and needs two resolutions like (32, 1); got "
                f"blocks_per_row={self.blocks_per_row} with resolutions={sides}; use budget instead"
            )
        for name, kind in (("coarse", Coarse), ("score", Score), ("scope", Scope)):
            if getattr(self, name) not in get_args(kind):
                expected = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {expected}; got {getattr(self, name)!r}")
        for name in ("first_blocks", "diagonal_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be (height, width) in tokens, got {self.grid}")

    def area(self, step: int) -> float:
        """Fraction of the legal entries that step ``step`` (0: the coarsest) may open.

        Areas shrink geometrically down to ``budget`` at the last step.
        """
        return float(self.budget ** ((step + 1) / (len(self.resolutions) - 1)))


PRESETS: dict[str, MraAttentionConfig] = {
    "mra2": MraAttentionConfig(),
    "mra2s": MraAttentionConfig(coarse="none"),
    "mra": MraAttentionConfig(resolutions=(16, 4, 1), coarse="per_query", first_blocks=1),
}
"""Named starting points: the paper's MRA-2 and MRA-2-s, and our own three-level recipe, made for
checkpoints that were not trained with it: the first tokens, on which pretrained models park
attention, go first in its budget (README, 'Methods')."""
