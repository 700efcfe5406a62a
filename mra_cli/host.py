"""Everything we know about transformers' inside, in one file: how an attention implementation is
registered and switched on, and what its masks mean.

A mask reaches us as a `LazyMask`: a tensor in name only, decoded to an O(N) `AttentionMask`, and
made dense only if somebody else touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import count
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto import modeling_auto

from mra_kernels import AttentionMask

AttentionFunction = Callable[..., tuple[Tensor, None]]

_serial = count()

_HIDDEN = -9999.0
"""Additive masks at or below this hide a key; hosts write -inf, the dtype's least, or -1e4."""


@contextmanager
def attention_function(model: PreTrainedModel, function: AttentionFunction) -> Iterator[None]:
    """Let ``function`` be the model's attention, with lazy masks, while the context is open.

    The name is registered for this context alone, so contexts nest and models don't disturb each
    other. Modules that don't go through transformers' attention interface never call ``function``.
    """
    # The name must not contain 'sdpa', 'flash' or 'flex_attention': the host tests for substrings.
    name = f"mra_{next(_serial)}"
    owners = [model, *model.modules()]
    every = [config for owner in owners for config in _configs(getattr(owner, "config", None))]
    configs = [config for config in every if hasattr(config, "_attn_implementation_internal")]
    before = [config._attn_implementation_internal for config in configs]
    register(name, function)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def register(name: str, function: AttentionFunction) -> None:
    """Make ``function``, with lazy masks, known to transformers as implementation ``name``."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lazy_mask)


def chosen_implementations(config: Any, name: str) -> dict[str, str] | None:
    """What the caller chose at load instead of ``name``: by sub-config, "" for the outermost.

    None: everything, so nothing is left for ``name``.
    """
    parts = {"": config, **{key: getattr(config, key, None) for key in config.sub_configs or ()}}
    choices = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    chosen = {key: choice for key, choice in choices.items() if choice not in (None, name)}
    return None if len(chosen) == len(choices) else chosen


def forget_implementation(config: Any, name: str | None = None) -> None:
    """Leave attention to transformers where the config asks for ``name``, or for anything."""
    for part in _configs(config):
        if name in (None, part._attn_implementation_internal):
            part._attn_implementation_internal = None


def derived(base: type[PreTrainedModel], namespace: dict[str, Any], module: str) -> Any:
    """A class that is ``base`` in name, and for all that transformers asks of a class's origin.

    Re-saving writes the name to config.json, where other tools look it up. Weights of checkpoints
    with old names are renamed, on loading and saving, for classes that are not custom code alone.
    Whether a class can change implementations is read off the text of its module.
    """
    namespace |= {
        "__module__": module,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "is_custom_code": classmethod(lambda _: False),
        "_can_set_attn_implementation": classmethod(lambda _: base._can_set_attn_implementation()),
        "_can_set_experts_implementation": classmethod(
            lambda _: base._can_set_experts_implementation()
        ),
    }
    return type(base.__name__, (base,), namespace)


def auto_classes(config: Any) -> dict[str, str]:
    """For each Auto class that knows this kind of model, the class it makes: what to name in
    ``auto_map``.
    """
    found = {}
    for auto, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not auto.startswith("AutoModel") or mapping is None:
            continue
        names = mapping._model_mapping.get(config.model_type, ())
        names = (names,) if isinstance(names, str) else names
        classes = {name: getattr(transformers, name, None) for name in names}
        kind = type(config)
        fitting = [n for n, c in classes.items() if getattr(c, "config_class", None) is kind]
        if fitting:
            own = [name for name in fitting if name in (config.architectures or ())]
            found[auto] = (own or fitting)[0]
    return found


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it, which no module need own."""
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def cache_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer of the KV cache that an attention module is called with and will extend.

    None if there is no cache, if it is still empty, or if the module's place in it is not known.
    """
    given = [x for x in (*kwargs.values(), *args) if isinstance(x, Cache | EncoderDecoderCache)]
    index = getattr(module, "layer_idx", None)
    if not given or not isinstance(index, int):
        return None
    cache = given[0]
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = cache.layers
    layer = layers[index] if 0 <= index < len(layers) else None
    return layer if isinstance(getattr(layer, "keys", None), Tensor) else None


class LazyMask(torch.Tensor):
    """A boolean ``[B, 1, N, M]`` mask that is not there until somebody reads it.

    It has to be a four-dimensional tensor: `generate` builds masks ahead, calls ``contiguous()``
    on them and hands them back.
    """

    _request: dict[str, Any]
    _resolved: dict[bool, AttentionMask]

    @staticmethod
    def __new__(cls, request: dict[str, Any]) -> LazyMask:
        shape = (request["batch_size"], 1, request["q_length"], request["kv_length"])
        mask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.bool, device=request.get("device", "cpu")
        )
        mask._request = request
        mask._resolved = {}
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask{tuple(self.shape)}"

    def dense(self) -> Tensor:
        """The mask as transformers itself would build it for torch's SDPA."""
        request = {
            **self._request,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False,
        }
        mask: Tensor = sdpa_mask(**request)
        return mask

    def resolved(self, *, cross: bool = False) -> AttentionMask:
        """The mask as intervals; worked out once, for all layers that share it.

        Args:
            cross: Keys come from another sequence, so their padding says nothing of the queries.
        """
        if cross not in self._resolved:
            mask = _resolve(self)
            if not cross:
                mask = mask.with_padding(mask.key_valid, self._padding_of_queries())
            self._resolved[cross] = mask
        return self._resolved[cross]

    def unpadded(self) -> LazyMask:
        """The same mask on the CPU and without padding: all that is known of one on torch's meta
        device.
        """
        return LazyMask({**self._request, "device": "cpu", "attention_mask": None})

    @property
    def window(self) -> int | None:
        """Keys a row can see at most by the window or chunk in the mask's closures, if any."""
        return _window(self._request.get("mask_function"))

    def _padding_of_queries(self) -> Tensor | None:
        """Real queries ``[B, N]`` if keys and queries are the same tokens; None: all are."""
        offset, length = int(self._request.get("q_offset", 0)), self.shape[2]
        valid = self._request.get("attention_mask")
        if valid is None or valid.shape[-1] < offset + length:
            return None
        valid = valid[:, offset : offset + length].bool()
        return None if bool(valid.all()) else valid

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]

        def dense(value: Any) -> Any:
            return value.dense() if isinstance(value, LazyMask) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def lazy_mask(**request: Any) -> Tensor:
    """transformers' mask function: remembers the request instead of carrying it out."""
    if torch.compiler.is_compiling():
        mask: Tensor = sdpa_mask(**request)
        return mask
    offset = request.get("q_offset", 0)
    if isinstance(offset, Tensor):  # a static cache counts on in place before attention runs
        request["q_offset"] = offset.clone()
    return LazyMask(request)


def read_mask(
    mask: Tensor | None,
    module: nn.Module,
    query: Tensor,
    n_keys: int,
    is_causal: bool | None,
    *,
    cross: bool = False,
) -> tuple[AttentionMask | None, Tensor | None]:
    """What an attention function was told about visibility.

    Args:
        mask: What the host passed: a `LazyMask`, a boolean or additive tensor of the host's or the
            user's own making, or None.
        module: The attention module; its ``is_causal`` counts where nothing else is said.
        query: Queries of this call, ``[B, H, N, D]``.
        n_keys: Keys of this call.
        is_causal: The keyword argument of the same name, None if it was not passed.
        cross: Keys come from another sequence.

    Returns:
        The mask, and the additive bias ``[B or 1, H or 1, N, M]`` if the tensor held one. The mask
        is None if heads differ in what they may see; everything is then in the bias. It may cover
        fewer keys than there are: none is visible beyond.
    """
    if isinstance(mask, LazyMask):
        return mask.resolved(cross=cross), None
    n_queries, device = query.shape[2], query.device
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if causal and n_queries > 1:
            return AttentionMask.causal(n_queries, n_keys, offset=0, device=device), None
        return AttentionMask.full(n_queries, n_keys, device=device), None
    mask = mask[..., :n_keys].expand(-1, -1, n_queries, -1)
    if mask.dtype == torch.bool:
        visible, bias = mask, None
    else:
        visible = mask > _HIDDEN
        bias = mask.masked_fill(~visible, 0.0)
        bias = bias if bool(bias.any()) else None
    if not bool((visible == visible[:, :1]).all()):
        if mask.dtype == torch.bool:
            mask = query.new_zeros(mask.shape).masked_fill(~visible, -torch.inf)
        return None, mask
    return AttentionMask.from_dense(visible[:, 0], query_offset=n_keys - n_queries), bias


def _resolve(mask: LazyMask) -> AttentionMask:
    request = mask._request
    n_queries, n_keys = mask.shape[2:]
    kv_offset = int(request.get("kv_offset", 0))
    offset = int(request.get("q_offset", 0)) - kv_offset
    position = torch.arange(n_queries, device=mask.device)[None] + offset + kv_offset
    function = request.get("mask_function", masking_utils.causal_mask_function)
    interval = _interval(function, position)
    if interval is None:
        return AttentionMask.from_dense(mask.dense()[:, 0], query_offset=offset)
    start, stop = ((x - kv_offset).clamp(0, n_keys) for x in interval)
    valid = request.get("attention_mask")
    if valid is not None:
        valid = valid[:, kv_offset : kv_offset + n_keys].bool()
        valid = torch.nn.functional.pad(valid, (0, n_keys - valid.shape[1]))
        valid = None if bool(valid.all()) else valid
    # A static cache hands out keys that are not written yet: none beyond the last one seen.
    filled = max(1, int(stop.max()))
    if valid is not None and filled < n_keys:
        valid = valid[:, :filled]
        valid = None if bool(valid.all()) else valid
    start = torch.minimum(start, stop)
    return AttentionMask(start, stop, filled, key_valid=valid, query_offset=offset)


def _interval(function: Any, position: Tensor) -> tuple[Tensor, Tensor] | None:
    """Visible positions ``[start, stop)`` of queries at ``position``, if the closure has that form.

    transformers composes masks from closures; they are told apart by name. Any that is not known
    here is evaluated in full instead.
    """
    never, always = torch.zeros_like(position), torch.full_like(position, 1 << 40)
    if function is masking_utils.causal_mask_function:
        return never, position + 1
    if function is masking_utils.bidirectional_mask_function:
        return never, always
    name, inside = _opened(function)
    match name:
        case "and_masks":
            parts = [_interval(part, position) for part in inside["mask_functions"]]
            starts = [part[0] for part in parts if part is not None]
            stops = [part[1] for part in parts if part is not None]
            if len(starts) < len(parts):
                return None
            return reduce(torch.maximum, starts), reduce(torch.minimum, stops)
        case "sliding_window_overlay":
            return position - inside["sliding_window"] + 1, always
        case "sliding_window_bidirectional_overlay":
            reach = inside["sliding_window"]
            return position - reach, position + reach + 1
        case "chunked_overlay":
            size, padding = inside["chunk_size"], inside["left_padding"][:, None]
            start = (position - padding) // size * size + padding
            return start, start + size
    return None


def _window(function: Any) -> int | None:
    name, inside = _opened(function)
    match name:
        case "and_masks":
            return next(filter(None, map(_window, inside["mask_functions"])), None)
        case "sliding_window_overlay":
            return int(inside["sliding_window"])
        case "sliding_window_bidirectional_overlay":
            return 2 * int(inside["sliding_window"]) + 1
        case "chunked_overlay":
            return int(inside["chunk_size"])
    return None


def _opened(closure: Any) -> tuple[str, dict[str, Any]]:
    """The name of the function that made a closure, and the variables it closed over."""
    names = getattr(getattr(closure, "__code__", None), "co_freevars", ())
    cells = getattr(closure, "__closure__", None) or ()
    inside = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    return getattr(closure, "__qualname__", "").split(".")[0], inside
