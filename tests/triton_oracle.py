"""How far results of the Triton kernels may be from float64: twice as far as those of plain torch
that rounds where the kernels say they round.

That reference is the specification itself, in float32, with the same blocks opened; for half types
weights are rounded before they meet values, and so are gradients of logits before they meet
queries and keys, and where queries score block means, those means.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from mra_kernels import KeyPyramid, mra_attention, reference
from mra_kernels.api import MraResult
from mra_kernels.selection import BlockPairs, Selection
from triton_cases import UNIT, Call


def check(call: Call) -> None:
    """Output, lse and plan of ``impl="triton"``."""
    with torch.no_grad():
        result = attend(call, call.tokens, pyramid=_pyramid(call))
        plan = result.selection
        exact = attend(call, _double(call.tokens), impl="reference", selection=plan)
        with rounding(call):
            same = attend(call, call.tokens, impl="reference", selection=plan)
    compare("output", result.output, same.output, exact.output, call)
    blind = exact.lse.isinf()
    assert torch.equal(result.lse.isinf(), blind)
    compare("lse", *(x.lse.masked_fill(blind, 0.0) for x in (result, same, exact)), call)
    _check_plan(call, plan)


def check_gradients(call: Call) -> None:
    """Those of queries, keys, values and sinks."""
    result, ours = gradients(call, call.tokens)
    plan = {"impl": "reference", "selection": result.selection}
    _, exact = gradients(call, _double(call.tokens), **plan)
    with rounding(call):
        _, same = gradients(call, call.tokens, **plan)
    for name, *three in zip(("dq", "dk", "dv", "dsinks"), ours, same, exact, strict=False):
        compare(name, *three, call)


def attend(
    call: Call, tokens: tuple[Tensor, ...], impl: str = "triton", **more: object
) -> MraResult:
    """The call on these tokens; a fourth are sinks."""
    extras = {**call.extras, **({"sinks": tokens[3]} if len(tokens) > 3 else {})}
    fixed = {"config": call.config, "mask": call.mask, "impl": impl}
    return mra_attention(*tokens[:3], **fixed, **extras, **more)


def gradients(
    call: Call, tokens: tuple[Tensor, ...], **how: object
) -> tuple[MraResult, tuple[Tensor, ...]]:
    """And gradients of tokens, and of sinks if there are any, for a fixed one of the output."""
    sinks = [call.extras["sinks"].to(tokens[0].device)] if "sinks" in call.extras else []
    leaves = [x.detach().requires_grad_() for x in (*tokens, *sinks)]
    result = attend(call, leaves, **how)
    generator = torch.Generator().manual_seed(call.mask.n_queries)
    grad = torch.randn(result.output.shape, generator=generator).to(call.setting.dtype)
    return result, torch.autograd.grad(
        result.output, leaves, grad.to(result.output), materialize_grads=True
    )


def compare(name: str, ours: Tensor, same: Tensor, exact: Tensor, call: Call) -> None:
    """By the largest error and by the root of the mean square of all of a tensor; one entry alone
    may have come out right by luck. Sums in another order, and peaks of a running softmax at
    another time, round other numbers: of a few entries that leaves more than twice the error, so
    much as rounding the largest term twice, or in float32, where sums are all there is, 64 times.
    """
    assert not ours.isnan().any(), f"NaN in {name}"
    dtype = torch.float32 if name == "lse" else call.setting.dtype
    units = 64 if dtype == torch.float32 else 2
    floor = units * UNIT[dtype] * _largest_term(name, exact, call)
    error, expected = (x.double() - exact.double() for x in (ours, same))
    for norm, share in ((_largest, 1), (_rms, 4)):
        found, allowed = norm(error), 2 * norm(expected) + floor / share
        assert found <= allowed, f"{name}: {found:.2e}, its precision explains {allowed:.2e}"


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max())


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _largest_term(name: str, exact: Tensor, call: Call) -> float:
    """Of the sums that a result is: where they cancel, errors do not."""
    q, k, v = (float(x.double().norm(dim=-1).max()) for x in call.tokens)
    scaling = call.extras["scaling"] / call.tokens[0].shape[-1] ** 0.5
    terms = {"output": _largest(call.tokens[2]), "lse": 1.0, "dsinks": v}
    terms |= {"dq": scaling * v * k, "dk": scaling * v * q}
    return max(_largest(exact), terms.get(name, 0.0))


def _double(tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tokens)


def _pyramid(call: Call) -> KeyPyramid | None:
    """Of the keys, as a cache that grew."""
    if not call.cached:
        return None
    pyramid = KeyPyramid(call.config.resolutions[:1])
    _, key, value = call.tokens
    valid = call.mask.key_valid
    for length in call.cached:
        known = None if valid is None else valid[:, :length]
        pyramid.extend(key[:, :, :length], value[:, :, :length], known)
    return pyramid


# --- the reference of the same precision -----------------------------------------------------


class _Rounded(torch.autograd.Function):
    """Rounds numbers, not their gradients; or the other way round."""

    @staticmethod
    def forward(ctx, x, dtype, back):
        ctx.dtype = dtype if back else x.dtype
        return x.clone() if back else x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None, None


class _Normalised(torch.autograd.Function):
    """``weighted / mass``, rounded; its gradients are worked out from what was rounded."""

    @staticmethod
    def forward(ctx, weighted, mass, dtype):
        mass = mass.masked_fill(mass == 0, 1.0)[..., None]
        output = (weighted / mass).to(dtype).to(mass.dtype)
        ctx.save_for_backward(output, mass)
        return output

    @staticmethod
    def backward(ctx, grad):
        output, mass = ctx.saved_tensors
        return grad / mass, -((grad * output) / mass).sum(-1), None


@contextmanager
def rounding(call: Call) -> Iterator[None]:
    """`mra_reference` rounds where kernels for the call's dtype do."""
    dtype, per_query = call.setting.dtype, call.config.coarse == "per_query"
    plain = reference._Rows, reference._coarse_part, reference.block_pyramid, reference._with_sinks

    class Rows(plain[0]):
        def add(self, row, logits, values):
            logits = _Rounded.apply(logits, dtype, True)
            peak = logits.detach().amax(-1)
            base = peak.masked_fill(peak == -torch.inf, 0.0)
            weights = torch.exp(logits - base[..., None])
            parts = peak, weights.sum(-1), _Rounded.apply(weights, dtype, False) @ values
            repeat = self._peak.shape[1] // logits.shape[1]
            for whole, part in zip((self._peak, self._mass, self._weighted), parts, strict=True):
                whole.index_copy_(0, row, part.repeat_interleave(repeat, dim=1))

    def coarse_part(*arguments):
        with mock.patch.object(reference, "_Rows", Rows if per_query else plain[0]):
            return plain[1](*arguments)

    def pyramid(*arguments):
        means = plain[2](*arguments)
        return {
            side: _Rounded.apply(x, dtype, False) if per_query else x for side, x in means.items()
        }

    def with_sinks(*arguments):
        part = plain[3](*arguments)
        output = _Normalised.apply(part.weighted, part.mass, dtype)
        return reference.SoftmaxPart(part.peak, torch.ones_like(part.mass), output)

    with mock.patch.multiple(
        reference,
        _Rows=Rows,
        _coarse_part=coarse_part,
        block_pyramid=pyramid,
        _with_sinks=with_sinks,
    ):
        yield


# --- the plan --------------------------------------------------------------------------------


def _check_plan(call: Call, chosen: Selection) -> None:
    """Budgets are kept and used; where scores are exact, the blocks are those of the reference."""
    legal, real = call.mask.legal_per_row(), call.mask.query_valid
    legal = (legal if real is None else legal * real).sum(-1, keepdim=True)
    if call.config.blocks_per_row is None:
        assert (chosen.density <= call.config.budget + chosen.forced + 1e-6).all()
        if call.config.budget == 1:
            assert ((chosen.density >= 1 - 1e-6) | (legal == 0)).all()
        if not call.exact_scores:
            return
    theirs = attend(call, tuple(x.float() for x in call.tokens), impl="reference").selection
    ours, theirs = _pairs(chosen.fine), _pairs(theirs.fine)
    assert torch.equal(ours[:, :2], theirs[:, :2]), "other numbers of blocks in rows"
    if call.exact_scores:
        assert torch.equal(ours, theirs), "other blocks"


def _pairs(pairs: BlockPairs) -> Tensor:
    return torch.stack([pairs.head, pairs.row, pairs.col], 1)
