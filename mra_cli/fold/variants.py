"""The leaner variants as a start for training: fitted in closed form, and never equivalent.

| variant | queries | keys | values |
| --- | --- | --- | --- |
| `optimised` | as they are | as they are | slices of the input |
| `efficient` | fitted | slices of the input | slices of the input |
| `super` | fitted | slices of the input | slices of the input, mixed over positions |

A head's slice is its own columns of the input, so a checkpoint of the same class holds these
variants as projections that are the identity, to be frozen (or taken out) in training. `super`
mixes positions by one matrix per site, for one length, which no class has a place for: it is
written beside the weights.

After 'You Need to Pay Better Attention' (arXiv 2403.01643), whose models are trained from scratch.
The fits are ours: queries by least squares over the input's covariance, so that ``q' . slice(x)``
is as near as can be to the old score; the output projection by ridge regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.fold.identities import Weights, wide
from mra_cli.fold.projections import Projections, Watched
from mra_cli.fold.report import VariantFigures

VARIANTS = ("optimised", "efficient", "super")

RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Strengths of ridge regression to choose from: shares of the mean square of what is regressed
on."""

MIXING_RIDGES = (1.0, 10.0, 100.0, 1000.0)
"""The same for mixes of positions, of which there are more than samples can tell."""

_SHRINKAGE = 1e-3
"""Of covariances that are inverted, likewise."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One site as a variant, float64.

    Attributes:
        found: Its layers.
        query, query_bias: ``[H, in, D]`` and ``[H, D]``, or None: as they are.
        mixing: Positions by positions ``[M, M]``, or None: not mixed.
        output, output_bias: ``[H * Dv, out]`` and ``[out]``.
        figures: How far off it is.
    """

    found: Projections
    query: Tensor | None
    query_bias: Tensor | None
    mixing: Tensor | None
    output: Tensor
    output_bias: Tensor
    figures: VariantFigures

    def write(self) -> None:
        """Put it in the place of the site's projections, the mixing apart."""
        found = self.found
        assert found.value is not None and found.output is not None
        _make_identity(found, "value")
        if self.query is not None and self.query_bias is not None:
            assert found.query is not None
            _make_identity(found, "key")
            bias = None if found.query.bias is None else self.query_bias.flatten()
            found.query.write(self.query.transpose(0, 1).flatten(1), bias)
        bias = None if found.output.bias is None else self.output_bias
        found.output.write(self.output, bias)


def reason_against(kind: str, found: Projections) -> str | None:
    """Why a site can't become a variant, in one line; None if it can."""
    site = found.site
    value, output = found.value, found.output
    if value is None or output is None:
        return "its values or its output are changed between layer and attention"
    if site.is_cross:
        return "it is cross-attention: queries and keys have inputs of their own"
    if site.kv_heads != site.heads:
        return f"{site.heads} query heads share {site.kv_heads} key heads: it is leaner already"
    if value.weight.shape[0] != site.heads * site.value_dim:
        return (
            f"slices of its input would be {value.weight.shape[0] // site.heads} wide, and its "
            f"values are {site.value_dim}"
        )
    if kind != "optimised":
        if found.query is None or found.key is None:
            return "its queries and keys are rotated or normalised after their layers"
        if site.head_dim != site.value_dim:
            return f"its keys are {site.head_dim} wide, and slices {site.value_dim}"
    return None


def fit(kind: str, calls: Sequence[tuple[Projections, Watched]], held_out: Watched) -> Variant:
    """Fit a variant of one site.

    Args:
        kind: One of `VARIANTS`.
        calls: What to fit on, of the same site.
        held_out: What to tell its error on.

    Raises:
        InputError: The site can't become one.
    """
    found = calls[0][0]
    reason = reason_against(kind, found)
    if reason is not None:
        raise InputError(f"{found.site.name} can't be {kind}: {reason}; choose others by --layers")
    seen = [watched for _, watched in calls]
    weights = Weights.of(found)
    query = bias = mixing = None
    if kind != "optimised":
        query, bias = _queries(weights, seen, found.site.heads)
    if kind == "super":
        mixing = _mixing(found, weights, seen, query, bias)
    mixed = [_mixed(found, watched, query, bias, mixing) for watched in seen]
    targets = [_flat(watched.output) for watched in seen]
    assert found.output is not None
    output, constant = _ridge(mixed, targets, with_constant=found.output.bias is not None)
    wanted = _flat(held_out.output)
    given = _mixed(found, held_out, query, bias, mixing) @ output + constant
    size = wanted.norm().clamp(min=1e-300)
    width = output.shape[0] * output.shape[1]
    before = sum(
        part.weight.numel() for part in (found.query, found.key, found.value, found.output) if part
    )
    removed = width if kind == "optimised" else 2 * width
    figures = VariantFigures(
        site=found.site.name,
        parameters_before=before,
        parameters_after=before - removed + (0 if mixing is None else mixing.numel()),
        gap=float((given - wanted).norm() / size),
        constant_gap=float((torch.cat(targets).mean(0) - wanted).norm() / size),
    )
    return Variant(found, query, bias, mixing, output, constant, figures)


def _queries(weights: Weights, seen: list[Watched], heads: int) -> tuple[Tensor, Tensor]:
    """``[H, in, D]`` and ``[H, D]``: the queries whose products with slices of the input are
    nearest to the old scores, over inputs of this covariance (rows' constants left out)."""
    assert weights.query is not None and weights.key is not None
    inputs = torch.cat([_flat(watched.key_input) for watched in seen])
    covariance = torch.cov(inputs.T)
    fitted, biases = [], []
    for head, part in enumerate(torch.arange(len(covariance)).chunk(heads)):
        within = covariance[part][:, part]
        within = within + _SHRINKAGE * within.diagonal().mean() * torch.eye(len(part)).to(within)
        onto = torch.linalg.solve(within, covariance[part]).T  # [in, D]
        through = weights.key[head].T @ onto
        fitted.append(weights.query[head] @ through)
        biases.append(weights.query_bias[head] @ through)
    return torch.stack(fitted), torch.stack(biases)


def _mixing(
    found: Projections,
    weights: Weights,
    seen: list[Watched],
    query: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The mix of positions ``[M, M]``, lower-triangular if causal, that does best on the last
    sample: of those whose slices are nearest to the old values on the others, shrunk more or less
    towards the identity, and the identity itself."""
    assert weights.value is not None and found.output is not None
    matrix, shift = weights.value.transpose(0, 1).flatten(1), weights.value_bias.flatten()
    inputs = [_flat(watched.value_input) for watched in seen]
    eye, mask = torch.eye(len(inputs[0])).to(inputs[0]), seen[0].call.mask
    if len(seen) == 1:
        return eye
    wanted = [x @ matrix + shift for x in inputs[:-1]]
    causal = mask is not None and mask.is_causal
    mixes = [_shrunk_mix(inputs[:-1], wanted, strength, causal) for strength in MIXING_RIDGES]
    targets, with_constant = [_flat(w.output) for w in seen], found.output.bias is not None

    def error(mix: Tensor) -> float:
        mixed = [_mixed(found, watched, query, bias, mix) for watched in seen]
        output, constant = _ridge(mixed[:-1], targets[:-1], with_constant=with_constant)
        return float((mixed[-1] @ output + constant - targets[-1]).norm())

    return min([eye, *mixes], key=error)


def _shrunk_mix(
    inputs: list[Tensor], wanted: list[Tensor], strength: float, causal: bool
) -> Tensor:
    eye = torch.eye(len(inputs[0])).to(inputs[0])
    gram = sum((x @ x.T for x in inputs), torch.zeros_like(eye))
    gram = gram + strength * gram.diagonal().mean() * eye
    cross = sum(((y - x) @ x.T for x, y in zip(inputs, wanted, strict=True)), torch.zeros_like(eye))
    if not causal:
        return eye + torch.linalg.solve(gram, cross.T).T
    for row in range(len(eye)):
        known = torch.linalg.solve(gram[: row + 1, : row + 1], cross[row, : row + 1])
        eye[row, : row + 1] += known
    return eye


def _mixed(
    found: Projections,
    watched: Watched,
    query: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor | None,
) -> Tensor:
    """What the variant's heads give, before the output projection: ``[B * N, H * Dv]``."""
    call: AttentionCall = wide(found, watched)
    assert watched.value_input is not None
    heads = call.value.shape[1]
    inputs = watched.value_input.double()
    sliced = inputs.unflatten(2, (heads, -1)).transpose(1, 2)
    if query is not None and bias is not None:
        assert watched.query_input is not None
        asked = torch.einsum("bni,hid->bhnd", watched.query_input.double(), query)
        call = replace(call, query=asked + bias[None, :, None], key=sliced)
    values = sliced if mixing is None else mixing @ sliced
    return _flat(replace(call, value=values).exact().transpose(1, 2).flatten(2))


def _ridge(
    given: list[Tensor], wanted: list[Tensor], *, with_constant: bool
) -> tuple[Tensor, Tensor]:
    """``[in, out]`` and ``[out]`` of the ridge regression of ``[T, out]`` on ``[T, in]``.

    The strength is the one of `RIDGES` that does best on the last sample, fitted on the others;
    the fit is then made again on all.
    """
    best = RIDGES[-1]
    if len(given) > 1:
        errors = {}
        for strength in RIDGES:
            parts = torch.cat(given[:-1]), torch.cat(wanted[:-1])
            matrix, constant = _solved(*parts, strength, with_constant)
            errors[strength] = float((given[-1] @ matrix + constant - wanted[-1]).norm())
        best = min(errors, key=lambda strength: errors[strength])
    return _solved(torch.cat(given), torch.cat(wanted), best, with_constant)


def _solved(
    given: Tensor, wanted: Tensor, strength: float, with_constant: bool
) -> tuple[Tensor, Tensor]:
    mean_in, mean_out = given.mean(0), wanted.mean(0)
    if not with_constant:
        mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
    x, y = given - mean_in, wanted - mean_out
    gram = x.T @ x
    gram = gram + strength * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    matrix = torch.linalg.solve(gram, x.T @ y)
    return matrix, mean_out - mean_in @ matrix


def _make_identity(found: Projections, name: str) -> None:
    part = getattr(found, name)
    width = part.weight.shape[0]
    bias = None if part.bias is None else torch.zeros(width, dtype=torch.float64)
    part.write(torch.eye(width, dtype=torch.float64), bias)


def _flat(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double().flatten(0, -2)
