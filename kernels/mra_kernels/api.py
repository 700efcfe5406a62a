"""The one door to the operator: checks, then dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mra_kernels import _triton, native
from mra_kernels.config import MraAttentionConfig, MraKeysConfig
from mra_kernels.decode import KeyPyramid
from mra_kernels.keys import KeyChoice, keys_reference
from mra_kernels.layout import BlockLayout
from mra_kernels.masks import AttentionMask
from mra_kernels.reference import mra_reference
from mra_kernels.scores import ScoreRule
from mra_kernels.selection import Selection

Impl = Literal["auto", "native", "triton", "reference"]


@dataclass(frozen=True, eq=False)
class MraResult:
    """What one call computed.

    Attributes:
        output: ``[B, H, N, Dv]``, dtype of ``value``.
        lse: Log-sum-exp of the exactly computed logits, ``[B, H, N]``; -inf for rows with none.
        selection: Which blocks, or keys, were exact, and the density reached.
        impl: The implementation that ran.
    """

    output: Tensor
    lse: Tensor
    selection: Selection | KeyChoice
    impl: str


def mra_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    config: MraAttentionConfig | MraKeysConfig,
    mask: AttentionMask | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    impl: Impl = "auto",
    selection: Selection | KeyChoice | None = None,
    pyramid: KeyPyramid | None = None,
) -> MraResult:
    """Multi-resolution attention (arXiv 2207.10284) on any shape, mask and head grouping.

    Args:
        query: ``[B, H, N, D]``, any float dtype.
        key: ``[B, Hkv, M, D]``, Hkv dividing H; not repeated for grouped queries.
        value: ``[B, Hkv, M, Dv]``.
        config: Which of the two operators, and its settings.
        mask: Who may see whom; None: everyone.
        scaling: Factor on ``q . k``; None: ``D ** -0.5``.
        softcap: Soft-cap of the logits.
        sinks: Logits that only feed the denominator, ``[H]``.
        bias: Added to the logits, ``[B or 1, H or 1, N, M]``.
        impl: ``reference`` (plain torch, every device and dtype, gradients), ``native`` (C++ on
            CPUs), ``triton`` (GPUs; two resolutions with gradients, single keys without), or
            ``auto``: the fastest that can take the call, named in the result.
        selection: The blocks or keys to open, from another call with the same config and mask,
            instead of choosing them; ``reference`` only.
        pyramid: Block means of these keys and values, kept from call to call (`KeyPyramid`), for a
            `MraAttentionConfig`; implementations that cannot use it work them out.

    Under `torch.autocast` queries, keys and values are cast as
    `torch.nn.functional.scaled_dot_product_attention` casts them: all but float64.

    Raises:
        ValueError: Shapes, dtypes, mask or grid do not fit together, or ``impl`` can't take them.
    """
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tokens = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            return mra_attention(
                *tokens, config=config, mask=mask, scaling=scaling, softcap=softcap, sinks=sinks,
                bias=bias, impl=impl, selection=selection, pyramid=pyramid,
            )  # fmt: skip
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    _check(query, key, value, mask, sinks, bias)
    mask = mask or AttentionMask.full(query.shape[2], key.shape[2], device=query.device)
    layout = None
    sides = config.resolutions if isinstance(config, MraAttentionConfig) else (config.rows, 1)
    if pyramid is not None and (pyramid.sides != sides[:-1] or config.grid is not None):
        raise ValueError(
            f"pyramid must have blocks of {sides[:-1]} and no grid, got {pyramid.sides} with grid "
            f"{config.grid}; make one for this config"
        )
    if config.grid is not None:
        if isinstance(config, MraAttentionConfig) and config.block_shapes[0][0] != sides[0]:
            sides = (config.block_shapes[0][0], *sides)
        layout = _image_layout(query, key, mask, bias, config.grid, sides)
        query, key, value = (layout.blocked(x) for x in (query, key, value))
        slots = layout.filled.numel()
        filled = layout.filled[None].expand(query.shape[0], -1)
        full = AttentionMask.full(slots, slots, device=query.device)
        # Empty slots see nothing, so that they cost nothing.
        mask = AttentionMask(full.start, full.stop * layout.filled, slots, filled, filled)
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, bias)
    impl = _resolved(impl, (query, key, value, sinks), mask, config, bias, selection)
    call = query, key, value, mask
    plan: Selection | KeyChoice
    if isinstance(config, MraKeysConfig):
        assert not isinstance(selection, Selection)
        if impl == "native":
            output, lse, plan = native.keys_native(*call, config, rule, sinks)
        elif impl == "triton":
            output, lse, plan = _triton.keys_triton(*call, config, rule, sinks)
        else:
            output, lse, plan = keys_reference(*call, config, rule, sinks, selection)
    else:
        assert not isinstance(selection, KeyChoice)
        if impl == "native":
            output, lse, plan = native.mra_native(*call, config, rule, sinks, pyramid)
        elif impl == "triton":
            output, lse, plan = _triton.mra_triton(*call, config, rule, sinks, pyramid)
        else:
            output, lse, plan = mra_reference(*call, config, rule, sinks, selection)
    if layout is not None:
        output, lse = layout.restored(output), layout.restored(lse)
    return MraResult(output, lse, plan, impl)


def implementations() -> dict[str, str | None]:
    """Every implementation by name: None if it can be used here, else one line saying why not."""
    reasons = {"native": native.reason_against(), "triton": _triton.reason_here()}
    return {**reasons, "reference": None}


def reason_against(
    impl: str,
    *tensors: Tensor | None,
    mask: AttentionMask | None = None,
    config: MraAttentionConfig | MraKeysConfig | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Why an implementation can't take a call, in one line; None if it can.

    Args:
        impl: ``native``, ``triton`` or ``reference``.
        tensors: Queries, keys, values, sinks: those there are.
        mask, config, bias: As in `mra_attention`.
    """
    if impl == "native":
        return native.reason_against(*tensors, bias, mask=mask)
    if impl == "triton":
        return _triton.reason_against(*tensors, mask=mask, config=config, bias=bias)
    return None


def _resolved(
    impl: Impl,
    tensors: tuple[Tensor | None, ...],
    mask: AttentionMask,
    config: MraAttentionConfig | MraKeysConfig,
    bias: Tensor | None,
    selection: Selection | KeyChoice | None,
) -> Impl:
    # On CPUs Triton runs in its interpreter, for tests only.
    fast: Impl = "native" if tensors[0] is None or tensors[0].device.type == "cpu" else "triton"
    wanted = fast if impl == "auto" else impl
    reason = reason_against(wanted, *tensors, mask=mask, config=config, bias=bias)
    if selection is not None and wanted != "reference":
        reason = f"{wanted} chooses its own blocks; leave selection out"
    if impl == wanted and reason is not None:
        raise ValueError(f"{reason}; or use impl='reference'")
    return wanted if reason is None else "reference"


def _image_layout(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    bias: Tensor | None,
    grid: tuple[int, int],
    sides: tuple[int, ...],
) -> BlockLayout:
    if query.shape[2] != key.shape[2] or not mask.is_full or bias is not None:
        raise ValueError(
            "grid is for unmasked self-attention over the tokens of an image, without bias; got "
            f"{query.shape[2]} queries, {key.shape[2]} keys, "
            f"{'no mask' if mask.is_full else 'a mask'}, {'no' if bias is None else 'a'} bias; "
            "leave grid out of the config here"
        )
    return BlockLayout.image(query.shape[2], grid, sides, query.device)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be a float tensor [batch, heads, length, head_dim], got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must have dtype {query.dtype} on {query.device} like query, got "
                f"{tensor.dtype} on {tensor.device}"
            )
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != dim or heads % kv_heads:
        raise ValueError(
            f"key must have shape [{batch}, a divisor of {heads}, length, {dim}] to fit query "
            f"{list(query.shape)}, got {list(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape [{batch}, {kv_heads}, {n_keys}, any] to fit key "
            f"{list(key.shape)}, got {list(value.shape)}"
        )
    if mask is not None and (mask.n_queries, mask.n_keys) != (n_queries, n_keys):
        raise ValueError(
            f"mask must cover {n_queries} queries x {n_keys} keys, got {mask.n_queries} x "
            f"{mask.n_keys}"
        )
    if mask is not None and mask.start.shape[0] not in (1, batch):
        raise ValueError(f"mask must be for a batch of {batch} or 1, got {mask.start.shape[0]}")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], got {list(sinks.shape)}")
    if bias is not None:
        expected = (batch, heads, n_queries, n_keys)
        fits = bias.ndim == 4 and all(
            a == b or (a == 1 and i < 2)
            for i, (a, b) in enumerate(zip(bias.shape, expected, strict=True))
        )
        if not fits:
            raise ValueError(
                f"bias must have shape [{batch} or 1, {heads} or 1, {n_queries}, {n_keys}], got "
                f"{list(bias.shape)}"
            )
