"""H-Transformer-1D: near keys exactly, far ones at a resolution that falls with distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice, reason_against_part
from mra_cli.methods.rows import SoftmaxRows, Tally, groups


@dataclass(frozen=True)
class H1D(Approximation):
    """A binary hierarchy of blocks (Zhu and Soricut, ACL 2021, arXiv 2107.11906): pairs of
    neighbouring blocks exactly, then pairs of ever larger ones between means of 2, 4, 8 ... tokens.

    One stabiliser for all levels, means count as many keys as they stand for, and the hierarchy
    goes up to the whole sequence: public code differs in all three, and is wrong without training.

    Attributes:
        block: Tokens (or means) of a block.
    """

    name: ClassVar[str] = "h1d"
    about: ClassVar[About] = About(
        summary="blocks nearby exactly, far ones between means of 2, 4, 8, ... tokens",
        source="H-Transformer-1D: Zhu and Soricut, ACL 2021, arXiv 2107.11906",
        patterns=("NS", "CS"),
        cost="N x block x log N",
        masks="causal",
        honours=("soft-cap", "sinks"),
        adapted="causal: queries are not averaged, or rows would see later ones",
    )

    block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""
        return super().reason_against_call(call) or reason_against_part(self, call)

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        allowed = math.ceil(self.budget * call.n_keys / 2)
        side = allowed if self.block is None else self.block
        tally.settled["block"] = side
        nearby = groups(call.n_keys, 2 * side, call.query.device)
        rows.add(nearby, nearby)
        lse = rows.lse()
        merged = 2
        while side * merged < call.n_keys:
            _add_level(rows, side, merged)
            merged *= 2
        return rows.output(), lse


def _add_level(rows: SoftmaxRows, side: int, merged: int) -> None:
    """Blocks of ``side`` means of ``merged`` tokens, each with the other of its pair."""
    causal, mask = rows.mask.is_causal, rows.mask
    length = rows.key.shape[2]
    more = -length % (2 * side * merged)

    def pairs(tokens: Tensor, each: int) -> Tensor:
        """``[B, H, pairs, 2, side * merged / each, D]``."""
        return tokens.unflatten(2, (-1, 2, side * merged // each))

    keys = rows.key.new_ones(1, length) if mask.key_valid is None else mask.key_valid.to(rows.key)
    queries = rows.key.new_ones(1, length)
    if mask.query_valid is not None:
        queries = mask.query_valid.to(rows.key)
    key, sizes = _pair_means(rows.key, keys, merged, more)
    value, _ = _pair_means(rows.value, keys, merged, more)
    query = pad(rows.query, (0, 0, 0, more))
    each = 1
    if not causal:
        query, _ = _pair_means(rows.query, queries, merged, more)
        each = merged
    query, key, value = pairs(query, each), pairs(key, merged), pairs(value, merged)
    size = pairs(sizes[..., None], merged)[..., 0]
    own = torch.arange(length + more, device=key.device)
    own = own.masked_fill(own >= length, -1).view(1, 1, -1, 2, side * merged)
    for half in (1,) if causal else (0, 1):
        other = 1 - half
        logits = rows.rule.logits(query[:, :, :, half] @ key[:, :, :, other].transpose(3, 4))
        logits = logits + size[:, :, :, other].log()[..., None, :]
        part = rows.softmax(logits, value[:, :, :, other])
        rows.add_part(own[:, :, :, half], *(x.repeat_interleave(each, 3) for x in part))


def _pair_means(tokens: Tensor, real: Tensor, merged: int, more: int) -> tuple[Tensor, Tensor]:
    """Means of ``merged`` real tokens each, and of how many, ``[B or 1, 1, blocks]``."""
    sizes = pad(real, (0, more)).unflatten(1, (-1, merged)).sum(-1)
    sums = pad(tokens * real[:, None, :, None], (0, 0, 0, more)).unflatten(2, (-1, merged)).sum(3)
    return sums / sizes.clamp(min=1)[:, None, :, None], sizes[:, None]
