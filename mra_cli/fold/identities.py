"""The exact identities: what can be folded at a site, what it costs, and whether it holds.

- `key bias`: it adds the same number to all scores of a row, which softmax does not see.
- `value bias`: the weights of a row sum to one, so it goes through to the output's bias.
- `value x output`: W_V W_O of a head as one matrix of the model's width.
- `query x key`: W_Q W_K' of a head as one, likewise.

The products are exact and keep the model's width per head, so with several heads they grow the
model. Both together let decoding cache a layer's input once, in place of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.fold.projections import Projection, Projections, Watched
from mra_cli.fold.report import Cost, IdentityFigures

IDENTITIES = ("key bias", "value bias", "value x output", "query x key")
BIASES = IDENTITIES[:2]
"""Those that a checkpoint of the same class can hold."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The matrices of all heads of a site in float64, keys and values repeated for shared heads.

    Attributes:
        query, key, value: ``[H, in, D or Dv]``; None: not found.
        query_bias, value_bias: ``[H, D or Dv]``, zero where there is none. A bias of the keys
            changes nothing.
        output: ``[H, Dv, out]``.
        output_bias: ``[out]``.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    query_bias: Tensor
    value_bias: Tensor
    output: Tensor | None
    output_bias: Tensor

    @classmethod
    def of(cls, found: Projections) -> Weights:
        site = found.site

        def by_head(part: Projection | None, heads: int) -> tuple[Tensor | None, Tensor]:
            if part is None:
                return None, torch.zeros(1)
            matrix, bias = part.weight, part.bias
            bias = matrix.new_zeros(matrix.shape[1]) if bias is None else bias
            shared = site.heads // heads
            return (
                matrix.unflatten(1, (heads, -1)).transpose(0, 1).repeat_interleave(shared, 0),
                bias.unflatten(0, (heads, -1)).repeat_interleave(shared, 0),
            )

        query, query_bias = by_head(found.query, site.heads)
        key, _ = by_head(found.key, site.kv_heads)
        value, value_bias = by_head(found.value, site.kv_heads)
        output, output_bias = None, torch.zeros(1, dtype=torch.float64)
        if found.output is not None:
            output = found.output.weight.unflatten(0, (site.heads, -1))
            bias = found.output.bias
            output_bias = output.new_zeros(output.shape[2]) if bias is None else bias
        return cls(query, key, value, query_bias, value_bias, output, output_bias)


def figures(found: Projections, watched: Watched) -> list[IdentityFigures]:
    """What each identity would do at a site, and by how much its output moved in float64."""
    return [
        _key_bias(found, watched),
        _value_bias(found, watched),
        _value_output(found, watched),
        _query_key(found, watched),
    ]


def apply_biases(found: Projections) -> None:
    """Fold the biases of a site that `figures` found to hold, in place."""
    if reason_against_key_bias(found) is None:
        assert found.key is not None and found.key.bias is not None
        found.key.write(None, torch.zeros_like(found.key.bias))
    if reason_against_value_bias(found) is None:
        assert found.value is not None and found.value.bias is not None
        assert found.output is not None
        found.output.write(None, _folded_bias(Weights.of(found)))
        found.value.write(None, torch.zeros_like(found.value.bias))


def reason_against_key_bias(found: Projections) -> str | None:
    """Why the key bias can't be dropped; None if it can, and there is one."""
    if found.key is None:
        return "keys are rotated or normalised after their layer"
    if found.key.bias is None or not bool(found.key.bias.any()):
        return "there is none"
    blocking = [extra for extra in found.site.extras if extra != "bias"]
    if blocking:
        return f"the site has {' and '.join(blocking)}, which a shift of all scores moves"
    return None


def reason_against_value_bias(found: Projections) -> str | None:
    """Why the value bias can't be folded into the output's; None if it can, and there is one."""
    if found.value is None:
        return "values are changed after their layer"
    if found.value.bias is None or not bool(found.value.bias.any()):
        return "there is none"
    if "sinks" in found.site.extras:
        return "the site has sinks, so that weights sum to less than one"
    if found.output is None:
        return "attention's output is changed before it is projected"
    if found.output.bias is None:
        return "the output projection has no bias to take it"
    return None


def _folded_bias(weights: Weights) -> Tensor:
    assert weights.output is not None
    return weights.output_bias + torch.einsum("hd,hdo->o", weights.value_bias, weights.output)


def _key_bias(found: Projections, watched: Watched) -> IdentityFigures:
    reason = reason_against_key_bias(found)
    bias = None if found.key is None else found.key.bias
    cost = Cost(0 if bias is None else len(bias), 0, 0)
    gap = None
    if reason is None:
        assert bias is not None
        call = wide(found, watched)
        without = call.key - bias.unflatten(0, (call.key.shape[1], -1))[None, :, None]
        gap = _gap(replace(call, key=without).exact(), call.exact(), call)
    return IdentityFigures("key bias", found.site.name, cost, Cost(0, 0, 0), reason, gap)


def _value_bias(found: Projections, watched: Watched) -> IdentityFigures:
    reason = reason_against_value_bias(found)
    bias = None if found.value is None else found.value.bias
    cost = Cost(0 if bias is None else len(bias), 0, 0)
    gap = None
    if reason is None:
        assert bias is not None
        weights, call = Weights.of(found), wide(found, watched)
        assert weights.output is not None
        without = call.value - bias.unflatten(0, (call.value.shape[1], -1))[None, :, None]
        moved = torch.einsum("bhnd,hdo->bno", replace(call, value=without).exact(), weights.output)
        gap = _gap(moved + _folded_bias(weights), _output(call.exact(), weights), call)
    return IdentityFigures("value bias", found.site.name, cost, Cost(0, 0, 0), reason, gap)


def _value_output(found: Projections, watched: Watched) -> IdentityFigures:
    site, weights = found.site, Weights.of(found)
    if weights.value is None or weights.output is None:
        part = "values are" if weights.value is None else "attention's output is"
        return IdentityFigures(
            "value x output", site.name, None, None, f"{part} changed on the way", None
        )
    width, out = weights.value.shape[1], weights.output.shape[2]
    own = site.value_dim
    before = Cost(
        width * site.kv_heads * own + site.heads * own * out, site.heads * own, site.kv_heads * own
    )
    after = Cost(site.heads * width * out, site.heads * width, width)
    call = wide(found, watched)
    assert watched.value_input is not None
    mixed = replace(call, value=_shared(watched.value_input, site.kv_heads)).exact()
    moved = torch.einsum("bhni,hio->bno", mixed, weights.value @ weights.output)
    gap = _gap(moved + _folded_bias(weights), _output(call.exact(), weights), call)
    return IdentityFigures(
        "value x output", site.name, before, after, _growth(before, after, site.heads), gap
    )


def _query_key(found: Projections, watched: Watched) -> IdentityFigures:
    site, weights = found.site, Weights.of(found)
    if weights.query is None or weights.key is None:
        reason = "positions are rotated in between, or queries and keys normalised"
        return IdentityFigures("query x key", site.name, None, None, reason, None)
    from_query, from_key, own = weights.query.shape[1], weights.key.shape[1], site.head_dim
    before = Cost(
        from_query * site.heads * own + from_key * site.kv_heads * own,
        site.heads * own,
        site.kv_heads * own,
    )
    after = Cost(site.heads * from_query * from_key, site.heads * from_key, from_key)
    call, gap = wide(found, watched), None
    assert watched.query_input is not None and watched.key_input is not None
    if "soft-cap" not in site.extras and "sinks" not in site.extras:
        inputs = watched.query_input.double()
        queries = torch.einsum("bni,hid->bhnd", inputs, weights.query)
        queries = (queries + weights.query_bias[None, :, None]) @ weights.key.transpose(1, 2)
        keys = _shared(watched.key_input, site.kv_heads)
        gap = _gap(replace(call, query=queries, key=keys).exact(), call.exact(), call)
    return IdentityFigures(
        "query x key", site.name, before, after, _growth(before, after, site.heads), gap
    )


def _growth(before: Cost, after: Cost, heads: int) -> str:
    """Why a product is not written: it grows the model, or a class has no place for it."""
    ratio = after.parameters / before.parameters
    if ratio >= 1:
        return f"grows these parameters {ratio:.3g}x ({heads} heads)"
    return f"shrinks these parameters to {ratio:.2f}x, but the class keeps two matrices"


def _output(mixed: Tensor, weights: Weights) -> Tensor:
    assert weights.output is not None
    return torch.einsum("bhnd,hdo->bno", mixed, weights.output) + weights.output_bias


def wide(found: Projections, watched: Watched) -> AttentionCall:
    """The attention call in float64, its tensors computed anew from the layers' inputs."""
    call = watched.call
    names = ("query", "key", "value", "sinks", "bias")
    tensors = {n: x.double() for n in names if (x := getattr(call, n)) is not None}
    for name, part in (("query", found.query), ("key", found.key), ("value", found.value)):
        given = getattr(watched, f"{name}_input")
        if part is not None and given is not None:
            made = given.double() @ part.weight
            made = made if part.bias is None else made + part.bias
            tensors[name] = made.unflatten(2, (tensors[name].shape[1], -1)).transpose(1, 2)
    return replace(call, **tensors)


def _shared(inputs: Tensor, heads: int) -> Tensor:
    """The same ``[B, M, in]`` for every head, float64."""
    return inputs.double()[:, None].expand(-1, heads, -1, -1)


def _gap(moved: Tensor, exact: Tensor, call: AttentionCall) -> float:
    """Relative difference over rows that count: a row that sees no key has no weights to sum."""
    keep = call.valid_rows[:, :, None]
    keep = keep[:, None] if moved.ndim == 4 else keep
    off, size = (((moved - exact) * keep).norm(), (exact * keep).norm())
    return float(off.detach() / size.detach().clamp(min=1e-300))
