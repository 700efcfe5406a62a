"""Find the attention sites of a model by letting it run and seeing which modules call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_cli.calls import MOST_SPECIAL_TOKENS, AttentionCall
from mra_cli.errors import UnsupportedModelError
from mra_cli.host import LazyMask, attention_function

Verdict = Literal["patch", "exact", "refused"]

FEW_KEYS = 64
"""Attention over no more keys than this has nothing to gain: two blocks of 32."""


@dataclass(frozen=True)
class Site:
    """An attention module as it is called.

    Attributes:
        name: The module's qualified name.
        kind: NS, CS, NC or CC: noncausal or causal, self or cross. Cross-attention of a causal
            decoder is CC.
        heads, kv_heads: Query heads, and key heads they share.
        head_dim, value_dim: Width of queries and keys, and of values.
        window: Most keys a row can see where the mask hides far ones, else None.
        extras: What else enters its scores: ``bias``, ``soft-cap``, ``sinks``.
        grid: Rows and columns of image patches if its tokens form an image, else None.
        calls: Calls in one forward pass (ALBERT calls one module once per layer).
        verdict: ``patch``: can be approximated; ``exact``: could, without gain; ``refused``: can't.
        reason: Why, if not ``patch``.
    """

    name: str
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    extras: tuple[str, ...]
    grid: tuple[int, int] | None
    calls: int
    verdict: Verdict
    reason: str

    @property
    def is_cross(self) -> bool:
        """Keys come from another sequence than queries."""
        return self.kind[1] == "C"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """The site that `dataclasses.asdict` gave, after a journey through JSON."""
        grid = data["grid"]
        grid = None if grid is None else tuple(grid)
        return cls(**{**data, "extras": tuple(data["extras"]), "grid": grid})


@torch.no_grad()
def find_sites(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Site]:
    """The sites that a forward pass on ``inputs`` calls, in the order of their first call.

    The model runs twice: as it is, and with every attention call answered by our exact attention.
    If its output then differs, something in it does not go through transformers' attention
    interface but depends on it (MPNet), and every site is refused.

    Args:
        inputs: Arguments of the model. For encoder-decoders, give the two sides different lengths,
            so that cross-attention can be told from self-attention.

    Raises:
        UnsupportedModelError: No module calls the attention interface.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, list[AttentionCall]] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        cross = query.shape[2] != key.shape[2]
        call = AttentionCall.from_host(
            module, query, key, value, attention_mask, cross=cross, grid=None, **kw
        )
        calls.setdefault(names[module], []).append(call)
        return call.exact().transpose(1, 2).contiguous(), None

    try:
        before = output_tensors(model(**inputs))
    except Exception as error:  # whatever the model's code raises on inputs it was not made for
        raise UnsupportedModelError(
            f"{type(model).__name__} must run on {' and '.join(inputs)} alone; "
            f"it raised {type(error).__name__}: {error}"
        ) from error
    check_numbers(model, before)
    with attention_function(model, record):
        after = output_tensors(model(**inputs))
    off = 0.0
    if calls:
        off = max(_difference(a, b, inputs) for a, b in zip(before, after, strict=True))
    return _listed(model, calls, off, inputs)


@torch.no_grad()
def sketch_sites(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Site]:
    """`find_sites` for a model on the meta device: who calls, with which shapes and masks.

    What only numbers can tell stays unknown: whether other parts of the model depend on how
    attention is computed.

    Raises:
        UnsupportedModelError: No module calls the attention interface, or the model can't be run
            without its weights.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, list[AttentionCall]] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        cross = query.shape[2] != key.shape[2]
        mask = attention_mask.unpadded() if isinstance(attention_mask, LazyMask) else None
        call = AttentionCall.from_host(
            module, _shape(query), _shape(key), _shape(value), mask, cross=cross, grid=None, **kw
        )
        calls.setdefault(names[module], []).append(call)
        batch, heads, length, _ = query.shape
        return value.new_empty(batch, length, heads, value.shape[3]), None

    try:
        with attention_function(model, record):
            model(**inputs)
    except Exception as error:  # whatever the model's code raises without numbers
        raise UnsupportedModelError(
            f"{type(model).__name__} must run without its weights to be laid out, and raised "
            f"{type(error).__name__}: {error}; pass --measure to run it with them"
        ) from error
    return _listed(model, calls, 0.0, inputs)


def check_numbers(model: PreTrainedModel, outputs: list[Tensor]) -> None:
    """Refuse a model that answers NaN: no comparison with it means anything.

    Raises:
        UnsupportedModelError: It does.
    """
    if any(bool(output.isnan().any()) for output in outputs):
        raise UnsupportedModelError(
            f"the output of {type(model).__name__} must be numbers, got NaN in {model.dtype}; try "
            "--dtype float32; if that gives NaN too, its weights are damaged: download them again"
        )


def output_tensors(output: Any) -> list[Tensor]:
    """The float tensors of a model's output, in order; caches left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in output_tensors(part)]


def _shape(tensor: Tensor) -> Tensor:
    """A tensor of that shape on the CPU, without memory of its own."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _listed(
    model: PreTrainedModel,
    calls: Mapping[str, list[AttentionCall]],
    off: float,
    inputs: Mapping[str, Any],
) -> list[Site]:
    if not calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} must send its attention through transformers' attention "
            "interface to be patched, and none of its modules does; it computes attention itself"
        )
    decoder = any(call[0].mask is not None and call[0].mask.is_causal for call in calls.values())
    modules = dict(model.named_modules())
    return [
        _site(name, made, off, decoder, _grid(modules, name, inputs, made[0].n_keys))
        for name, made in calls.items()
    ]


def _site(
    name: str,
    calls: list[AttentionCall],
    off: float,
    decoder: bool,
    grid: tuple[int, int] | None,
) -> Site:
    call = calls[0]
    cross = call.n_queries != call.n_keys
    causal = decoder if cross else call.mask is not None and call.mask.is_causal
    extras = {"bias": call.bias, "soft-cap": call.softcap, "sinks": call.sinks}
    window = call.window or (call.mask.window if call.mask is not None else None)
    verdict: Verdict = "patch"
    reason = ""
    tolerance = 1e-4 if call.query.dtype in (torch.float32, torch.float64) else 5e-2
    if not off <= tolerance:
        verdict, reason = (
            "refused",
            (
                "other parts of the model depend on how attention is computed "
                f"(its output moves by {off:.2g})"
            ),
        )
    elif call.mask is None:
        verdict, reason = "refused", "its heads have different masks"
    elif (widest := min(call.n_keys, window or call.n_keys)) <= FEW_KEYS:
        verdict, reason = "exact", f"sees at most {widest} keys: nothing to gain"
    return Site(
        name=name,
        kind=("C" if causal else "N") + ("C" if cross else "S"),
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.query.shape[3],
        value_dim=call.value.shape[3],
        window=window,
        extras=tuple(extra for extra, value in extras.items() if value is not None),
        grid=None if cross or causal else grid,
        calls=len(calls),
        verdict=verdict,
        reason=reason,
    )


def _difference(before: Tensor, after: Tensor, inputs: Mapping[str, Any]) -> float:
    """Relative Frobenius distance over rows that are not padding."""
    padding = inputs.get("attention_mask")
    if padding is not None and padding.shape == before.shape[:2] == after.shape[:2]:
        before, after = before[padding.bool()], after[padding.bool()]
    norm = before.double().norm()
    return float((before.double() - after.double()).norm() / norm) if norm > 0 else 0.0


def _grid(
    modules: Mapping[str, nn.Module], name: str, inputs: Mapping[str, Any], n_tokens: int
) -> tuple[int, int] | None:
    """Rows and columns of patches, if the module belongs to an encoder that patches the picture."""
    pixels = inputs.get("pixel_values")
    parts = name.split(".")
    owners = (modules[".".join(parts[:end])] for end in range(len(parts), -1, -1))
    config = next((o.config for o in owners if hasattr(o, "config")), None)
    patch = getattr(config, "patch_size", None)
    if pixels is None or pixels.ndim != 4 or not isinstance(patch, int):
        return None
    rows, cols = pixels.shape[2] // patch, pixels.shape[3] // patch
    return (rows, cols) if 0 <= n_tokens - rows * cols <= MOST_SPECIAL_TOKENS else None
