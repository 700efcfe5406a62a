"""The operator on GPUs, in Triton. Only the modules below this one import triton."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from mra_kernels.config import MraAttentionConfig, MraKeysConfig
from mra_kernels.masks import AttentionMask

if TYPE_CHECKING:
    from mra_kernels.decode import KeyPyramid
    from mra_kernels.keys import KeyChoice
    from mra_kernels.scores import ScoreRule
    from mra_kernels.selection import Selection

SIDES = (16, 32, 64)
WIDEST = 256
_MOST_ROWS = 1024
_MOST_PAIRS, _MOST_ENTRIES = 1 << 27, 1 << 36
_INSTALLED = importlib.util.find_spec("triton") is not None

__all__ = [
    "block_means",
    "keys_triton",
    "mra_triton",
    "reason_against",
    "reason_here",
    "runs_on_cpu",
]


def reason_against(
    *tensors: Tensor | None,
    mask: AttentionMask | None = None,
    config: MraAttentionConfig | MraKeysConfig | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Why the kernels can't take this call, in one line; None if they can.

    Args:
        tensors: Queries, keys, values, sinks: those there are.
        mask, config, bias: As in `mra_kernels.mra_attention`; None: not asked about.
    """
    given = [x for x in tensors if x is not None]
    reasons = (
        _unusable(),
        _against_config(config),
        _against_tensors(given),
        _against_transforms(given),
    )
    for reason in reasons:
        if reason is not None:
            return reason
    if bias is not None:
        return "triton has no kernel for a bias"
    if mask is not None and mask.dense is not None:
        return "triton takes masks that are intervals and padding, not any matrix"
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if wanted and isinstance(config, MraKeysConfig):
        return "triton has no backward pass for single keys ('mra')"
    later = exporting()  # when the graph runs
    if mask is not None and isinstance(config, MraAttentionConfig) and not later:
        return against_lengths(mask.n_queries, mask.n_keys, *config.block_shapes[0])
    return None


def against_lengths(n_queries: int, n_keys: int, query_rows: int, side: int) -> str | None:
    """Why the kernels can't take so many blocks of ``query_rows`` by ``side``, as
    `reason_against`."""
    entries = n_queries * n_keys
    if entries > _MOST_ENTRIES or entries > _MOST_PAIRS * query_rows * side:
        return f"triton counts {_MOST_ENTRIES:.1e} entries and {_MOST_PAIRS:.1e} blocks a head"
    return None


def _against_config(config: MraAttentionConfig | MraKeysConfig | None) -> str | None:
    if isinstance(config, MraKeysConfig):
        if config.rows not in SIDES:
            return f"triton takes blocks of 16, 32 or 64 queries, got {config.rows}"
        return None
    if config is not None and len(config.resolutions) != 2:
        return f"triton takes two resolutions like (32, 1), got {config.resolutions}"
    if config is not None and config.resolutions[0] not in SIDES:
        return f"triton takes blocks of 16, 32 or 64, got {config.resolutions[0]}"
    rows = None if config is None else config.query_rows
    if rows is not None and (rows.bit_count() != 1 or rows > _MOST_ROWS):
        return f"triton takes powers of two up to {_MOST_ROWS} as query_rows, got {rows}"
    return None


def _against_tensors(given: list[Tensor]) -> str | None:
    for tensor in given:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"triton takes float16, bfloat16 and float32, got {tensor.dtype}"
        if tensor.shape[-1] > WIDEST and tensor.ndim == 4:
            return f"triton takes heads up to {WIDEST} wide, got {tensor.shape[-1]}"
        if tensor.device.type not in ("cuda", "meta") and not runs_on_cpu():
            return "triton runs on GPUs only"
    return None


def _against_transforms(given: list[Tensor]) -> str | None:
    """What torch would answer with zeros, or in many words."""
    if torch.compiler.is_compiling():
        return None
    dual = any(unpack_dual(x).tangent is not None for x in given)
    if dual or torch._C._are_functorch_transforms_active():
        return "triton has gradients by torch.autograd only, not by torch.func or forward mode"
    return None


def exporting() -> bool:
    """Whether torch.export traces; before 2.7 torch doesn't say."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def runs_on_cpu() -> bool:
    """Triton's interpreter is on (TRITON_INTERPRET=1), or a test brought an executor."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    from mra_kernels._triton import tuning

    return tuning.LAUNCHER is not tuning.on_device


def reason_here() -> str | None:
    """Why the kernels can't run on this machine, in one line; None if they can."""
    reason = _unusable()
    if reason is None and not torch.cuda.is_available() and not runs_on_cpu():
        return "triton needs a GPU that torch can use; there is none here"
    return reason


def _unusable() -> str | None:
    return None if _INSTALLED else "triton is not installed; pip install triton (Linux)"


def mra_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraAttentionConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
    pyramid: KeyPyramid | None = None,
) -> tuple[Tensor, Tensor, Selection]:
    """MRA attention; arguments and results as in `mra_reference`, lse in float32.

    Gradients reach queries, keys, values and sinks, from output and lse; not their gradients.

    ``pyramid``: means of the blocks of these keys and values; None, or where gradients
    are wanted: work them out.
    """
    from mra_kernels._triton import autograd

    means = None
    if pyramid is not None and not torch.is_grad_enabled():
        keys, values = pyramid.blocks(key.shape[2])
        means = keys[config.resolutions[0]], values[config.resolutions[0]]
    return autograd.mra_triton(query, key, value, mask, config, rule, sinks, means)


def keys_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    config: MraKeysConfig,
    rule: ScoreRule,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, KeyChoice]:
    """Attention with opened keys exact; arguments and results as in `keys_reference`, lse in
    float32. No gradients."""
    from mra_kernels._triton import keys

    return keys.keys_triton(query, key, value, mask, config, rule, sinks)


def block_means(
    tokens: Tensor, valid: Tensor | None, sides: tuple[int, ...], into: dict[int, Tensor]
) -> None:
    """Means of blocks of ``[B, H, n, d]`` tokens, written into ``[B, H, n / side or more, d]``.

    Args:
        tokens: Features adjacent, or they are copied.
        valid: False for padding, bool ``[B or 1, n]``; None: all real.
        sides: Powers of two.
        into: Where to write, per side.
    """
    from mra_kernels._triton.pooling import pooled

    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    real = None if valid is None else valid.to(torch.uint8).contiguous()
    for side in sides:
        means = pooled(tokens, None, None, real, None, side, side, 0)[0]
        into[side][:, :, : means.shape[2]] = means
