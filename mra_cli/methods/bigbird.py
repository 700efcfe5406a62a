"""BigBird: blocks nearby, blocks at the ends, and random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.methods.base import About, Approximation, Choice, knob_for, reason_against_part
from mra_cli.methods.rows import SoftmaxRows, Tally, groups


@dataclass(frozen=True)
class BigBird(Approximation):
    """Three neighbouring blocks, the first and the last, and random ones (Zaheer et al., NeurIPS
    2020, arXiv 2007.14062). Rows of the first and the last block see everything.

    In causal calls: the own block and two before it, the first, and random earlier ones.

    Attributes:
        block: Rows and keys of a block.
        random: Random blocks per row of blocks and head.
        seed: Chooses them.
    """

    name: ClassVar[str] = "bigbird"
    about: ClassVar[About] = About(
        summary="neighbouring, first, last and random blocks",
        source="Zaheer et al., NeurIPS 2020, arXiv 2007.14062",
        patterns=("NS", "CS"),
        cost="N x (5 + random) x block",
        adapted="causal: own and two earlier blocks, first block, random earlier ones",
    )

    block: int | None = None
    random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if self.random < 0:
            raise ValueError(f"random must be at least 0, got {self.random}")

    def reason_against_call(self, call: AttentionCall) -> str | None:
        """Why this call can't be computed by it at all; None if it can."""
        return super().reason_against_call(call) or reason_against_part(self, call)

    def side(self, n_keys: int, causal: bool) -> int:
        """Tokens per block: the setting, or what the budget allows."""
        if self.block is not None:
            return min(self.block, n_keys)

        def cost(side: int) -> float:
            blocks = n_keys / side
            if causal:  # rows near the start have fewer blocks before them
                full = 4 + self.random
                rows = blocks * full - full * full / 2 if blocks > full else blocks**2 / 2
                return (rows - blocks / 2) * 2 / blocks**2 if blocks > 1 else 1.0
            rows = 2 * blocks + max(0.0, blocks - 2) * min(blocks, 5 + self.random)
            return min(1.0, rows / blocks**2)

        return n_keys if self.budget == 1.0 else knob_for(self.budget, cost, n_keys)

    def choose(self, call: AttentionCall, tally: Tally) -> Choice:
        mask = call.mask
        assert mask is not None
        side = self.side(call.n_keys, mask.is_causal)
        device, count = call.query.device, -(-call.n_keys // side)
        own = torch.arange(-(-call.n_queries // side), device=device)
        valid = call.key.new_ones(1, call.n_keys) if mask.key_valid is None else mask.key_valid
        first = (valid > 0).int().argmax(1) // side  # [B or 1]
        last = (call.n_keys - 1 - (valid > 0).int().flip(1).argmax(1)) // side
        reach = (-2, -1, 0) if mask.is_causal else (-1, 0, 1)
        near = own[:, None] + torch.tensor(reach, device=device)
        near = near.masked_fill((near < 0) | (near >= count), -1)[None].expand(len(first), -1, -1)
        ends = (first,) if mask.is_causal else (first, last)
        far = torch.stack(ends, 1)[:, None].expand(-1, len(own), -1)
        repeated = (far[..., None] == near[:, :, None]).any(-1)
        if not mask.is_causal:
            repeated[..., 1] |= first[:, None] == last[:, None]
        fixed = torch.cat([near, far.masked_fill(repeated, -1)], 2)[:, None]  # [B, 1, G, 5]
        taken = torch.zeros(len(first), len(own), count + 1, dtype=torch.bool, device=device)
        taken = taken.scatter(2, fixed[:, 0] % (count + 1), True)[..., :-1]
        if mask.is_causal:
            taken |= torch.arange(count, device=device) > own[:, None]
        generator = torch.Generator().manual_seed(self.seed)
        luck = torch.rand(call.query.shape[1], len(own), count, generator=generator).to(device)
        luck = luck[None].masked_fill(taken[:, None], -1.0)
        best = luck.topk(min(self.random, count), -1)
        chance = best.indices.masked_fill(best.values < 0, -1)  # [B, H, G, r]
        fixed = fixed.expand(-1, chance.shape[1], -1, -1)
        ends_of = torch.stack([first, last], 1)[:, None, None]
        return {"blocks": torch.cat([fixed, chance], 3), "ends": ends_of}

    def attend(self, call: AttentionCall, choice: Choice, tally: Tally) -> tuple[Tensor, Tensor]:
        rows = SoftmaxRows(call, tally)
        causal = rows.mask.is_causal
        side = self.side(call.n_keys, causal)
        tally.settled["block"] = side
        every = groups(call.n_queries, side, call.query.device)
        inner = torch.arange(side, device=every.device)
        blocks = choice["blocks"]
        keys = (blocks[..., None] * side + inner).flatten(3)
        keys = keys.masked_fill((keys < 0) | (keys >= call.n_keys), -1)
        if causal:
            rows.add(every, keys)
            return rows.output(), rows.lse()
        ends = choice["ends"]  # [B or 1, 1, 1, 2]

        def inside(row: Tensor, key: Tensor) -> Tensor:
            return ~(row // side == ends[..., None, :]).any(-1, keepdim=True)

        rows.add(every, keys, inside)
        whole = (ends[..., None] * side + inner).flatten(3)
        same = (ends[..., :1] == ends[..., 1:]).expand(-1, -1, -1, side)
        whole = whole.masked_fill(whole >= call.n_queries, -1)
        whole = torch.cat([whole[..., :side], whole[..., side:].masked_fill(same, -1)], 3)
        rows.add(whole, None)
        return rows.output(), rows.lse()
