"""Block means beside transformers' KV caches, and how to know that a cache only grew.

Attention functions get keys and values, not the cache they came from. A hook before the attention
module notes the cache layer; block means hang on that layer and live as long as it does. They are
kept only while the layer's tensors are the very ones of the last call, untouched since, and the new
call has brought just its own rows: reordered, cropped or reset caches start anew.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mra_cli.host import cache_layer
from mra_kernels import KeyPyramid

_LAYER, _BLOCKS = "_mra_cache_layer", "_mra_blocks"


class CachedBlocks:
    """Block means of one layer of one cache, for every choice of block sides in use."""

    def __init__(self) -> None:
        self._seen: tuple[tuple[weakref.ref[Tensor], int | None], ...] = ()
        self._length = 0
        self._kept: dict[tuple[int, ...], tuple[KeyPyramid, Tensor | None]] = {}

    def holds(self, *tensors: Tensor) -> bool:
        """Whether these are the tensors of the last call, not written to since."""
        now = [(x, _version(x)) for x in tensors]
        return len(now) == len(self._seen) and all(
            seen() is x and version == was
            for (x, version), (seen, was) in zip(now, self._seen, strict=True)
        )

    def grow(self, tensors: tuple[Tensor, ...], length: int, rows: int) -> None:
        """Note a call whose last ``rows`` of ``length`` keys are new."""
        if length != self._length + rows:
            self._kept.clear()
        self._seen = tuple((weakref.ref(x), _version(x)) for x in tensors)
        self._length = length

    def crop(self, length: int) -> None:
        """Forget the blocks of tokens from ``length`` on."""
        for pyramid, _ in self._kept.values():
            pyramid.length = min(pyramid.length, length)

    def pyramid(
        self, sides: tuple[int, ...], key: Tensor, value: Tensor, valid: Tensor | None
    ) -> KeyPyramid:
        """Means of all blocks so far; see `KeyPyramid.extend` for the arguments."""
        pyramid, known = self._kept.get(sides, (KeyPyramid(sides), None))
        if pyramid.length and not _same(known, valid, pyramid.length):
            pyramid = KeyPyramid(sides)
        pyramid.extend(key, value, valid)
        self._kept[sides] = pyramid, valid
        return pyramid


def note_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook (with kwargs) of attention modules: which cache layer is about to grow."""
    vars(module).pop(_LAYER, None)
    layer = cache_layer(module, args, kwargs)
    if layer is None:
        return
    blocks = vars(layer).get(_BLOCKS)
    if blocks is None or not blocks.holds(layer.keys, layer.values):
        setattr(layer, _BLOCKS, CachedBlocks())
    vars(module)[_LAYER] = layer


def noted_blocks(module: nn.Module, key: Tensor, value: Tensor) -> CachedBlocks | None:
    """The block means beside the cache that these keys and values came from, if it is a plain one.

    Sliding windows, quantised caches and the like hand out other tensors than they keep.
    """
    layer = vars(module).pop(_LAYER, None)
    if layer is None or layer.keys is not key or layer.values is not value:
        return None
    blocks: CachedBlocks = getattr(layer, _BLOCKS)
    return blocks


def _version(tensor: Tensor) -> int | None:
    """Counts writes to a tensor; None under inference_mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def _same(known: Tensor | None, valid: Tensor | None, length: int) -> bool:
    """Whether padding among the first ``length`` keys is what it was."""
    if known is not None and valid is not None:
        return torch.equal(known[:, :length], valid[:, :length])
    either = valid if known is None else known
    return either is None or bool(either[:, :length].all())
