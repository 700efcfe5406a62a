"""Random calls of the Triton kernels, and how far their results may be from float64.

What kernels are compiled for is fixed by a few settings; all else is drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from mra_kernels import AttentionMask, MraAttentionConfig, mra_attention
from mra_kernels._triton import selection, tuning
from mra_kernels.selection import BlockPairs, Selection
from mra_kernels.testing import make_qkv

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding once."""


@dataclass(frozen=True)
class Setting:
    """What kernels are compiled for, and the lengths they are tried at; ``in_tiles``: blocks are
    chosen by several programs a head, as in long sequences."""

    name: str
    dtype: torch.dtype
    widths: tuple[int, int]
    group: int
    config: MraAttentionConfig
    softcap: float | None = None
    sinks: bool = False
    padded: bool = False
    lengths: tuple[int, int] = (17, 400)
    gradients: bool = False
    in_tiles: bool = False


def _config(side: int, **fields: object) -> MraAttentionConfig:
    return MraAttentionConfig(resolutions=(side, 1), **fields)


SETTINGS = [
    Setting("mra2", torch.float32, (64, 64), 1, _config(32), gradients=True, in_tiles=True),
    Setting(
        "mra2 padded",
        torch.bfloat16,
        (64, 64),
        2,
        _config(32),
        padded=True,
        sinks=True,
        gradients=True,
    ),
    Setting("per query", torch.float16, (128, 128), 2, _config(64, coarse="per_query"), 3.0),
    Setting(
        "odd widths",
        torch.bfloat16,
        (40, 24),
        3,
        _config(16, coarse="none", scope="row"),
        padded=True,
    ),
    Setting(
        "priors",
        torch.float32,
        (16, 80),
        1,
        _config(16, coarse="per_query", score="mu", first_blocks=1, diagonal_blocks=1),
        padded=True,
        sinks=True,
        gradients=True,
    ),
    Setting(
        "block per row",
        torch.float32,
        (32, 32),
        2,
        _config(32, blocks_per_row=2, scope="row", diagonal_blocks=3),
        softcap=3.0,
        in_tiles=True,
        gradients=True,
    ),
    Setting("sparse only", torch.float16, (96, 96), 1, _config(64, coarse="none", score="mu")),
    Setting("long", torch.bfloat16, (64, 64), 2, _config(64), padded=True, lengths=(4097, 8192)),
    Setting(
        "shared lists",
        torch.bfloat16,
        (96, 80),
        2,
        _config(32, query_rows=128, diagonal_blocks=1),
        in_tiles=True,
        gradients=True,
    ),
    Setting(
        "shared by half a tile",
        torch.float32,
        (32, 48),
        1,
        _config(16, query_rows=32, coarse="per_query", first_blocks=1),
    ),
    Setting(
        "shared, sparse only",
        torch.float16,
        (128, 64),
        1,
        _config(16, query_rows=64, coarse="none", scope="row"),
        lengths=(1, 400),
        padded=True,
    ),
    Setting("few queries", torch.float32, (64, 64), 2, _config(16), lengths=(1, 16)),
]


@dataclass(frozen=True)
class Call:
    """One call of a setting, in tensors that may be views.

    Attributes:
        exact_scores: Scores are sums of small whole numbers: no rounding, so no doubt about which
            blocks are the best.
    """

    setting: Setting
    tokens: tuple[Tensor, Tensor, Tensor]
    mask: AttentionMask
    config: MraAttentionConfig
    extras: dict[str, object]
    exact_scores: bool

    def __repr__(self) -> str:
        """What fits in a line or two: tensors by shape."""
        shapes = [tuple(x.shape) for x in self.tokens]
        return f"<{self.setting.name} {shapes} {self.config} {self.mask.start[0, :3]} ...>"


@st.composite
def calls(draw: st.DrawFn, setting: Setting) -> Call:
    """Shapes, masks, padding, budgets and numbers."""
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    low, high = setting.lengths
    n = draw(st.integers(low, high))
    m = n if draw(st.booleans()) else draw(st.integers(max(1, low), max(high, 300)))
    rows, side = setting.config.block_shapes[0]
    exact = setting.softcap is None and not setting.padded and draw(st.booleans())
    if exact:
        n, m = (-(-x // of) * of for x, of in ((n, rows), (m, side)))
    heads, (d, dv), seed = kv_heads * setting.group, setting.widths, draw(st.integers(0, 2**16))
    tokens = make_qkv(seed, batch, heads, kv_heads, n, m, d, dv, torch.float32)
    if exact:
        tokens = (tokens[0].round(), tokens[1].round(), tokens[2])
    packed = draw(st.booleans())
    query, key, value = (_laid_out(x.to(setting.dtype), packed) for x in tokens)
    mask = _mask(draw, n, m)
    if setting.padded:
        valid = torch.ones(batch, m, dtype=torch.bool)
        for row in valid:
            count = draw(st.integers(0, m - 1))
            row[slice(0, count) if draw(st.booleans()) else slice(m - count, m)] = False
        mask = mask.with_padding(valid, valid if n == m else None)
    config = setting.config
    if config.blocks_per_row is None:
        budget = draw(st.sampled_from([0.01, 0.1, 0.25, 0.7, 1.0]))
        config = dataclasses.replace(config, budget=budget)
    extras: dict[str, object] = {"scaling": draw(st.sampled_from([0.125, 0.03125]))}
    if setting.softcap is not None:
        extras["softcap"] = setting.softcap
    if setting.sinks:
        extras["sinks"] = torch.linspace(-1, 3, heads)
    return Call(setting, (query, key, value), mask, config, extras, exact)


def _laid_out(tokens: Tensor, packed: bool) -> Tensor:
    """The same numbers, heads beside each other as projections leave them, or as they are."""
    return tokens.transpose(1, 2).contiguous().transpose(1, 2) if packed else tokens


def _mask(draw: st.DrawFn, n: int, m: int) -> AttentionMask:
    kind = draw(st.sampled_from(["full", "causal", "offset", "window", "chunk"]))
    if kind == "full":
        return AttentionMask.full(n, m)
    extra = {
        "causal": {},
        "offset": {"offset": draw(st.integers(0, 70))},
        "window": {"window": draw(st.integers(1, 200))},
        "chunk": {"chunk": draw(st.integers(1, 200))},
    }[kind]
    return AttentionMask.causal(n, m, **extra)


@contextmanager
def launched_by(launcher: object, in_tiles: bool = False) -> Iterator[None]:
    """``impl="triton"`` on CPU tensors, by this launcher; new memory holds NaN. ``in_tiles``: see
    `Setting`."""
    before = tuning.LAUNCHER, torch.are_deterministic_algorithms_enabled()
    tuning.LAUNCHER, tile = launcher, selection.LARGEST_TILE
    selection.LARGEST_TILE = 0 if in_tiles else tile
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        tuning.LAUNCHER, selection.LARGEST_TILE = before[0], tile
        torch.use_deterministic_algorithms(before[1])


def plainly(kernel, grid, arguments, settings):
    """The launcher for executor and interpreter."""
    kernel[grid](*arguments, **settings)


def check(call: Call) -> None:
    """Output, lse and plan of ``impl="triton"``; each entry within what rounding explains."""
    query, key, value = call.tokens
    given = {"config": call.config, "mask": call.mask}
    result = mra_attention(query, key, value, impl="triton", **given, **call.extras)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.extras.items()}
    wide = query.double(), key.double()

    def reference(values: Tensor):
        return mra_attention(
            *wide, values, impl="reference", selection=result.selection, **given, **double
        )

    exact = reference(value.double())
    scale = reference(value.double().abs()).output
    unit, logits = UNIT[value.dtype], _largest_logit(call)
    error = (result.output.double() - exact.output).abs()
    allowed = tolerance(call, unit, logits) * scale + unit * exact.output.abs() + 1e-7
    assert not result.output.isnan().any()
    worst = float((error / allowed).max())
    assert worst <= 1, f"{call.setting.name}: {worst:.1f} times the error that rounding explains"
    fine = (result.lse.double() - exact.lse).abs().nan_to_num(0)
    assert torch.equal(result.lse.isinf(), exact.lse.isinf())
    assert float(fine.max()) <= 64 * UNIT[torch.float32] * (1 + logits)
    _check_plan(call, result.selection)


def _check_plan(call: Call, chosen: Selection) -> None:
    """Budgets are kept and used; where scores are exact, the blocks are those of the reference."""
    if call.config.blocks_per_row is None:
        assert (chosen.density <= call.config.budget + chosen.forced + 1e-6).all()
        if call.config.budget == 1:
            assert (chosen.density >= 1 - 1e-6).all()
        if not call.exact_scores:
            return
    theirs = mra_attention(
        *(x.float() for x in call.tokens),
        config=call.config,
        mask=call.mask,
        impl="reference",
        **call.extras,
    ).selection
    rows, side = call.config.block_shapes[0]
    block = rows * side / call.mask.legal_per_row().sum(-1).clamp(min=1)
    assert ((chosen.density - theirs.density).abs() <= block.max()).all()
    if call.exact_scores:
        assert _pairs(chosen.fine) == _pairs(theirs.fine)


def check_gradients(call: Call) -> None:
    """Those of queries, keys, values and sinks, by their norm."""
    given = {"config": call.config, "mask": call.mask}
    sinks = call.extras.get("sinks")
    leaves = [x.detach().clone().requires_grad_() for x in (*call.tokens, *_there(sinks))]
    extras = {**call.extras, **({} if sinks is None else {"sinks": leaves[3]})}
    result = mra_attention(*leaves[:3], impl="triton", **given, **extras)
    generator = torch.Generator().manual_seed(call.mask.n_queries)
    grad = torch.randn(result.output.shape, generator=generator).to(result.output.dtype)
    result.output.backward(grad)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    extras = {**call.extras, **({} if sinks is None else {"sinks": wide[3]})}
    selection = result.selection
    exact = mra_attention(*wide[:3], impl="reference", selection=selection, **given, **extras)
    exact.output.backward(grad.double())
    unit, logits = UNIT[call.setting.dtype], _largest_logit(call)
    q, k, v = (float(x.detach().norm(dim=-1).max()) for x in wide[:3])
    # Where gradients cancel, to nothing in rows that see one key, errors are relative to the terms.
    terms = float(grad.double().norm()) * torch.tensor([k * v, q * v, 0.0, v]) / 10
    terms[:2] *= call.extras["scaling"]
    for name, ours, theirs, term in zip("qkvs", leaves, wide, terms, strict=False):
        error = float((ours.grad.double() - theirs.grad).norm())
        scale = float(theirs.grad.norm()) + float(term)
        allowed = 8 * unit * (1 + (call.config.coarse == "per_query") * logits)
        allowed = (allowed + 64 * UNIT[torch.float32] * (1 + logits)) * scale + 1e-6
        assert error <= allowed, f"{call.setting.name}: d{name} off by {error / allowed:.1f}"


def _there(tensor: object) -> list[Tensor]:
    return [tensor] if isinstance(tensor, Tensor) else []


def tolerance(call: Call, unit: float, logits: float) -> float:
    """Error relative to the sum of weights times absolute values.

    Weights are rounded once, for the product with the values, and the result once (`check`);
    logits carry the error of float32 sums. Where rows score means of keys themselves, those are
    rounded, too, and the means of values.
    """
    allowed = unit + 32 * UNIT[torch.float32] * (1 + logits)
    if call.config.coarse == "per_query":
        allowed += 2 * unit * (1 + logits)
    return allowed


def _largest_logit(call: Call) -> float:
    query, key, _ = (x.double() for x in call.tokens)
    scaling = call.extras["scaling"]
    return float(scaling * query.norm(dim=-1).max() * key.norm(dim=-1).max())


def _pairs(pairs: BlockPairs) -> list[list[int]]:
    return torch.stack([pairs.head, pairs.row, pairs.col], 1).tolist()
