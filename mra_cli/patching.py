"""Put methods in the place of exact attention: for a while and without a trace (`patched`), or for
as long as the model lives (`install`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mra_cli.caches import note_cache, noted_blocks
from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.host import AttentionFunction, attention_function
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

    with intercepted(model, plan.sites, answer):
        yield


def install(model: PreTrainedModel, plan: Plan, name: str) -> list[str]:
    """The plan at work for good, as the attention implementation ``name``, which must have been
    registered for `answer`.

    ``model.set_attn_implementation("sdpa")`` makes the model exact again, and
    ``set_attn_implementation(name)`` patched.

    Returns:
        The plan's sites that this model lacks: a model may be part of the one the plan was made
        for (an encoder alone), with or without the prefix of its base model.

    Raises:
        InputError: It has none of them.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    missing = []
    for site_name, site in plan.sites.items():
        for candidate in (site_name, site_name.removeprefix(prefix), prefix + site_name):
            if candidate in modules:
                setattr(modules[candidate], _SETTING, site)
                _noting_caches(modules[candidate], site)
                break
        else:
            missing.append(site_name)
    if plan.sites and len(missing) == len(plan.sites):
        raise InputError(
            f"the plan must name modules of {type(model).__name__}, which has none of its "
            f"{len(missing)} sites ({missing[0]} for one); make a plan for this model"
        )
    model.set_attn_implementation(name)
    return missing


def answer(site: SitePlan, call: AttentionCall) -> Tensor:
    """The output ``[B, H, N, Dv]`` of a call under a plan."""
    exact = site.reason_for_exact(call) is not None
    return call.exact() if exact else site.method(call).output


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

    before = {name: getattr(modules[name], _SETTING, None) for name in sites}
    hooks = [_noting_caches(modules[name], site) for name, site in sites.items()]
    try:
        for name, site in sites.items():
            setattr(modules[name], _SETTING, site)
        with attention_function(model, handled_by(handler)):
            yield
    finally:
        for hook in filter(None, hooks):
            hook.remove()
        for name, setting in before.items():
            if setting is not None:
                setattr(modules[name], _SETTING, setting)
            elif hasattr(modules[name], _SETTING):
                delattr(modules[name], _SETTING)


def _noting_caches(module: nn.Module, site: Setting) -> RemovableHandle | None:
    """Lets a self-attention module's calls know the cache that their keys come from."""
    if site.is_cross:
        return None
    return module.register_forward_pre_hook(note_cache, with_kwargs=True)


def handled_by(handler: Callable[[S, AttentionCall], Tensor]) -> AttentionFunction:
    """A transformers attention function that hands the calls of sites with a setting to
    ``handler``, and answers all others exactly.
    """

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

    return attention
