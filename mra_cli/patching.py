"""Put methods in the place of exact attention, for a while, and take them out without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from mra_cli.caches import note_cache, noted_blocks
from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.host import attention_function
from mra_cli.plan import Plan, SitePlan

_SETTING = "_mra_site"
"""Attribute of an attention module that holds its setting while patched: names survive copies of
the model, and layer indices are missing or shared in half of all architectures."""


class Setting(Protocol):
    """What has to be known of a site to read its calls; `Site` and `SitePlan` both are one."""

    @property
    def is_cross(self) -> bool: ...

    @property
    def grid(self) -> tuple[int, int] | None: ...


S = TypeVar("S", bound=Setting)


@contextmanager
def patched(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """The model with the plan's methods at work; on leaving, bit for bit what it was.

    A call a method has a reason not to take (decoding one token, say) is answered exactly.

    Raises:
        InputError: The plan names a module the model does not have.
    """

    def answer(site: SitePlan, call: AttentionCall) -> Tensor:
        exact = site.method.reason_for_exact(call) is not None
        return call.exact() if exact else site.method(call).output

    with intercepted(model, plan.sites, answer):
        yield


@contextmanager
def intercepted(
    model: PreTrainedModel, sites: Mapping[str, S], handler: Callable[[S, AttentionCall], Tensor]
) -> Iterator[None]:
    """Let ``handler`` answer every attention call of ``sites``; other calls stay exact.

    Args:
        sites: Setting by module name; it is handed to ``handler``.
        handler: Returns the attention output ``[B, H, N, Dv]`` of a call.
    """
    modules = dict(model.named_modules())
    missing = [name for name in sites if name not in modules]
    if missing:
        raise InputError(
            f"the plan must name modules of {type(model).__name__}, which has no {missing[0]}; "
            "make a plan for this model"
        )

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        site: S | None = getattr(module, _SETTING, None)
        cross, grid = (site.is_cross, site.grid) if site is not None else (True, None)
        blocks = noted_blocks(module, key, value)
        call = AttentionCall.from_host(
            module, query, key, value, attention_mask, cross=cross, grid=grid, blocks=blocks, **kw
        )
        if blocks is not None:
            blocks.grow((key, value), call.n_keys, call.n_queries)
        output = call.exact() if site is None else handler(site, call)
        return output.transpose(1, 2).contiguous(), None

    before = {name: getattr(modules[name], _SETTING, None) for name in sites}
    hooks = [
        modules[name].register_forward_pre_hook(note_cache, with_kwargs=True)
        for name, site in sites.items()
        if not site.is_cross
    ]
    try:
        for name, site in sites.items():
            setattr(modules[name], _SETTING, site)
        with attention_function(model, attention):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, setting in before.items():
            if setting is not None:
                setattr(modules[name], _SETTING, setting)
            elif hasattr(modules[name], _SETTING):
                delattr(modules[name], _SETTING)
