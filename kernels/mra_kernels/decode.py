"""Block means kept beside a cache of keys and values, so that decoding does not read all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from mra_kernels import _triton, native

_ROOM = 1.25
"""A growing cache is given this much more room than it needs, so that it is seldom moved."""


class KeyPyramid:
    """Means of blocks of keys and values at every side, extended in place as the cache grows.

    Attributes:
        sides: Block sides from coarse to fine.
        length: Tokens whose means are known.
        keys, values: Means per side, float32 ``[B, Hkv, blocks, D]`` and ``[..., Dv]``; blocks
            beyond the last known token hold anything.
    """

    def __init__(self, sides: tuple[int, ...]) -> None:
        self.sides = sides
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def extend(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        """Take in the tokens from ``self.length`` on; those before must not have changed.

        Args:
            key: All keys so far, ``[B, Hkv, M, D]``.
            value: ``[B, Hkv, M, Dv]``.
            valid: False for padding, bool ``[B or 1, M]``; None: all real.

        Raises:
            RuntimeError: Neither the C++ path nor Triton can be used here.
        """
        if key.shape[2] == self.length:
            return
        first = self.length // self.sides[0] * self.sides[0]
        self.keys = self._with_room(self.keys, key)
        self.values = self._with_room(self.values, value)
        valid = None if valid is None else valid[:, first:]
        for tokens, means in ((key, self.keys), (value, self.values)):
            into = {side: mean[:, :, first // side :] for side, mean in means.items()}
            new = tokens[:, :, first:]
            if tokens.device.type == "cpu" and not _triton.runs_on_cpu():
                native.block_means(native.floats(new), valid, self.sides, into)
            else:
                _triton.block_means(new, valid, self.sides, into)
        self.length = key.shape[2]

    def blocks(self, n_keys: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Means of the blocks of the first ``n_keys`` keys and values, per side."""
        keys, values = (
            {side: mean[:, :, : -(-n_keys // side)] for side, mean in means.items()}
            for means in (self.keys, self.values)
        )
        return keys, values

    def _with_room(self, means: dict[int, Tensor], tokens: Tensor) -> dict[int, Tensor]:
        """Buffers for as many blocks as the cache has."""
        batch_size, heads, n, width = tokens.shape
        if means and means[self.sides[-1]].shape[2] * self.sides[-1] >= n:
            return means
        room = -(-int(n * _ROOM if self.length else n) // self.sides[0]) * self.sides[0]
        bigger = {
            side: torch.zeros(batch_size, heads, room // side, width, device=tokens.device)
            for side in self.sides
        }
        for side, mean in means.items():
            bigger[side][:, :, : mean.shape[2]] = mean
        return bigger
