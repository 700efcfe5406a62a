"""Image layout: reorder tokens so that a block of the sequence is a patch of the picture.

The authors' ``input_shape`` option (4 x 8 patches for blocks of 32), for any nesting of block
sides and any grid; special tokens (class, registers) keep a block of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Where each token of the blocked sequence comes from.

    Attributes:
        source: Index of the token in each slot, int64 ``[slots]``; empty slots repeat token 0.
        filled: False for empty slots, bool ``[slots]``.
        slot: Slot of each token, int64 ``[n]``.
    """

    source: Tensor
    filled: Tensor
    slot: Tensor

    @classmethod
    def image(
        cls,
        n_tokens: int,
        grid: tuple[int, int],
        resolutions: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """Patches of the grid, whose tokens are the last ``height * width`` of the sequence.

        Raises:
            ValueError: The grid holds more tokens than the sequence.
        """
        height, width = grid
        special = n_tokens - height * width
        if special < 0:
            raise ValueError(
                f"grid {height} x {width} needs at least {height * width} tokens, got {n_tokens}"
            )
        shapes = patch_shapes(resolutions)
        side = resolutions[0]
        rows, cols = (
            x.flatten()
            for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        )
        # Mixed-radix position: patch first, then the place inside it, level by level.
        (patch_h, patch_w), across = shapes[0], -(-width // shapes[0][1])
        patch = rows // patch_h * across + cols // patch_w
        inside = torch.zeros_like(rows)
        for (outer_h, outer_w), (h, w) in pairwise(shapes):
            place = rows % outer_h // h * (outer_w // w) + cols % outer_w // w
            inside = inside * (outer_h // h * (outer_w // w)) + place
        first = -(-special // side) * side
        slots = torch.cat([torch.arange(special), first + patch * side + inside])
        total = first + int(patch.max() + 1) * side
        source = torch.zeros(total, dtype=torch.int64)
        source[slots] = torch.arange(n_tokens)
        filled = torch.zeros(total, dtype=torch.bool)
        filled[slots] = True
        return cls(source.to(device), filled.to(device), slots.to(device))

    def blocked(self, tokens: Tensor) -> Tensor:
        """``[B, H, n, d]`` to ``[B, H, slots, d]``."""
        return tokens[:, :, self.source]

    def restored(self, rows: Tensor) -> Tensor:
        """``[B, H, slots, ...]`` back to ``[B, H, n, ...]``."""
        return rows[:, :, self.slot]


def patch_shapes(resolutions: tuple[int, ...]) -> list[tuple[int, int]]:
    """Height and width of the patch that each block side stands for, each nested in the one before.

    Factors of two go to the wider side first: 32 is 4 x 8, 16 is 4 x 4, 8 is 2 x 4.
    """
    shapes = [(1, 1)]
    for coarse, fine in reversed(list(pairwise(resolutions))):
        ratio, (h, w) = coarse // fine, shapes[0]
        for factor in _prime_factors(ratio):
            h, w = (h * factor, w) if h < w else (h, w * factor)
        shapes.insert(0, (h, w))
    return shapes


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors
