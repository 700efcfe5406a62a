"""Random calls of the Triton kernels, each known by its setting and a number.

What kernels are compiled for is fixed by a few settings; all else is drawn. `triton_oracle` judges
what comes out.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from mra_kernels import AttentionMask, MraAttentionConfig
from mra_kernels._triton import backward, forward, selection, tuning

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding once."""


@dataclass(frozen=True)
class Setting:
    """What kernels are compiled for, and the lengths they are tried at.

    Attributes:
        widths: Of queries and keys, and of values.
        group: Query heads per key head.
        queries, keys: The shortest and the longest.
        limits: Whether lists are cut every 8 blocks and no 32 candidates are written down, so that
            calls of hundreds of tokens take the ways that else those of thousands take.
        in_tiles: Blocks are chosen by several programs a head, as in long sequences.
        tight: As in `Tiles`.
    """

    name: str
    dtype: torch.dtype
    widths: tuple[int, int]
    group: int
    config: MraAttentionConfig
    softcap: float | None = None
    sinks: bool = False
    padded: bool = False
    queries: tuple[int, int] = (17, 700)
    keys: tuple[int, int] = (1, 700)
    gradients: bool = False
    limits: bool = True
    in_tiles: bool = False
    tight: bool = False


def _config(side: int, **fields: object) -> MraAttentionConfig:
    return MraAttentionConfig(resolutions=(side, 1), **fields)


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SETTINGS = [
    Setting("mra2", F32, (64, 64), 1, _config(32), gradients=True, in_tiles=True),
    Setting(
        "mra2 padded", BF16, (64, 64), 2, _config(32),
        padded=True, sinks=True, gradients=True, in_tiles=True,
    ),
    Setting(
        "per query", F16, (128, 128), 2, _config(64, coarse="per_query"), 3.0, gradients=True
    ),
    Setting(
        "odd widths", BF16, (40, 24), 3, _config(16, coarse="none", scope="row"), padded=True
    ),
    Setting(
        "priors", F32, (16, 80), 1,
        _config(16, coarse="per_query", score="mu", first_blocks=1, diagonal_blocks=1),
        padded=True, sinks=True, gradients=True,
    ),
    Setting(
        "block per row", F32, (32, 32), 2,
        _config(32, blocks_per_row=2, scope="row", diagonal_blocks=3),
        softcap=3.0, gradients=True, in_tiles=True,
    ),
    Setting(
        "sparse only", F16, (96, 96), 1, _config(64, coarse="none", score="mu"), in_tiles=True
    ),
    Setting(
        "long", BF16, (64, 64), 2, _config(64),
        padded=True, queries=(1000, 8192), keys=(1000, 8192), limits=False,
    ),
    Setting(
        "shared lists", BF16, (96, 80), 2, _config(32, query_rows=128, diagonal_blocks=1),
        gradients=True, in_tiles=True, tight=True,
    ),
    Setting(
        "shared by half a tile", F32, (32, 48), 1,
        _config(16, query_rows=32, coarse="per_query", first_blocks=1),
    ),
    Setting(
        "shared, sparse only", F16, (128, 64), 1,
        _config(16, query_rows=64, coarse="none", scope="row"),
        queries=(1, 700), padded=True,
    ),
    Setting("steps", F32, (32, 48), 2, _config(64), gradients=True, padded=True),
    Setting("few queries", F32, (64, 64), 2, _config(16), queries=(1, 16), keys=(1, 2500)),
    Setting(
        "few queries padded", BF16, (64, 32), 3, _config(32, coarse="per_query"),
        padded=True, sinks=True, queries=(1, 16), keys=(1, 2500),
    ),
]  # fmt: skip
BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Call:
    """One call of a setting, in tensors that may be views.

    Attributes:
        name: How to draw it again.
        extras: Scaling, soft-cap and sinks.
        exact_scores: Scores are sums of small whole numbers: no rounding, so no doubt about which
            blocks are the best.
        cached: Lengths at which a `KeyPyramid` of the keys was extended; empty: there is none.
    """

    setting: Setting
    name: str
    tokens: tuple[Tensor, Tensor, Tensor]
    mask: AttentionMask
    config: MraAttentionConfig
    extras: dict[str, object]
    exact_scores: bool = False
    cached: tuple[int, ...] = ()


def call_of(setting: Setting, number: int) -> Call:
    """Shapes, strides, masks, padding, budgets and numbers."""
    draw = random.Random(f"{setting.name} {number}")
    (rows, side), heads_per_key = setting.config.block_shapes[0], setting.group
    batch, kv_heads = draw.randint(1, 3), draw.randint(1, 2)
    n = _length(draw, setting.queries, side)
    m = n if draw.random() < (0.7 if setting.padded else 0.4) else _length(draw, setting.keys, side)
    m = max(m, setting.keys[0])
    whole = setting.softcap is None and draw.random() < 0.4
    if whole and setting.queries[1] > 16:
        n, m = -(-n // rows) * rows, -(-m // side) * side
    elif whole:
        n, m = 1 if n < side else n, -(-m // side) * side
    shape = batch, kv_heads * heads_per_key, kv_heads, n, m
    layouts = _LAYOUTS + ["far apart"] * (setting.limits * (3 if max(n, m) > 256 else 1))
    tokens = _laid_out(draw.choice(layouts), _numbers(draw, shape, setting, whole))
    mask = _mask(draw, n, m, batch, whole)
    if setting.padded:
        valid = _valid(draw, batch, m, max(rows, side) if whole else 1)
        mask = mask.with_padding(valid, valid if n == m and draw.random() < 0.7 else None)
    config = setting.config
    if config.blocks_per_row is None:
        budget = draw.choice([0.1, 0.25, 0.5, 0.7] if whole else [1e-6, 0.01, 0.1, 0.25, 0.7, 1.0])
        config = dataclasses.replace(config, budget=budget)
    else:
        config = dataclasses.replace(config, blocks_per_row=draw.choice([1, 2, 5, 100]))
    extras: dict[str, object] = {"scaling": draw.choice([0.125, 0.03125])}
    if setting.softcap is not None:
        extras["softcap"] = setting.softcap
    if setting.sinks:
        extras["sinks"] = torch.linspace(-1, 3, shape[1])
    cached: tuple[int, ...] = ()
    if setting.queries[1] <= 16 and draw.random() < 0.5:
        cached = (*sorted(draw.randint(1, m) for _ in range(draw.randint(0, 2))), m)
    name = f"call_of(BY_NAME[{setting.name!r}], {number})"
    return Call(setting, name, tokens, mask, config, extras, whole, cached)


def _length(draw: random.Random, limits: tuple[int, int], side: int) -> int:
    """Short ones as often as long ones, and those about a multiple of the side more often."""
    low, high = limits
    length = round(math.exp(draw.uniform(math.log(low), math.log(high))))
    if draw.random() < 0.3:
        length = length // side * side + draw.choice([-1, 0, 1])
    return min(max(length, low), high)


def _numbers(
    draw: random.Random, shape: tuple[int, ...], setting: Setting, whole: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries, keys (doubled, for peaked rows) and values; or without any variety in keys,
    all 0, far apart, next to nothing, values of which few matter. ``whole``: integers."""
    batch, heads, kv_heads, n, m = shape
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    d, dv = setting.widths
    query = 2 * torch.randn(batch, heads, n, d, generator=generator)
    key = 2 * torch.randn(batch, kv_heads, m, d, generator=generator)
    value = torch.randn(batch, kv_heads, m, dv, generator=generator)
    kind = draw.choice(["normal"] * 5 + ["equal", "zero", "peaked", "flat", "outliers"])
    if kind == "equal":
        key = key[:, :, :1].expand_as(key).contiguous()
    elif kind == "zero":
        draw.choice([query, key]).zero_()
    elif kind == "peaked":
        query *= 20
    elif kind == "flat":
        query *= 1e-3
    elif kind == "outliers":
        value[:, :, :: max(1, m // 3)] *= 1000
    if whole:
        query, key = query.round().clamp(-6, 6), key.round()
    query, key, value = (x.to(setting.dtype) for x in (query, key, value))
    return query, key, value


_LAYOUTS = ["plain", "heads inside", "fused", "expanded", "wide rows", "columns"]


def _laid_out(kind: str, tokens: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers in memory as they are, or as projections, caches and broadcasts leave them
    (broadcasts make heads or batch entries equal), or over more than 2^31 numbers."""
    query, key, value = tokens
    if kind == "heads inside":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens)
    elif kind == "fused" and query.shape[2] == key.shape[2]:
        flat = torch.cat([x.transpose(1, 2).flatten(2) for x in tokens], -1)
        parts = flat.split([x.shape[1] * x.shape[3] for x in tokens], -1)
        query, key, value = (
            part.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
            for part, x in zip(parts, tokens, strict=True)
        )
    elif kind == "expanded":
        key, value = key[:1].expand_as(key), value[:, :1].expand_as(value)
    elif kind in ("wide rows", "fused"):
        query, key, value = (
            torch.cat([x[..., :3], x, x], -1)[..., 3 : 3 + x.shape[3]] for x in tokens
        )
    elif kind == "columns":
        query, key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in tokens)
    elif kind == "far apart":
        query, key, value = (_far_apart(x) for x in tokens)
    return query, key, value


def _far_apart(tokens: Tensor) -> Tensor:
    """In memory that takes room only where it is written; half of several are beyond 2^31."""
    batch, heads, n, width = tokens.shape
    step = max(batch * heads * width, (1 << 32) // n // 16 * 16 + 16)
    size = n * step * tokens.element_size()
    reserve_nothing = 0x4000  # MAP_NORESERVE of Linux
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    strides = heads * width, width, step, 1
    return (
        torch.frombuffer(memory, dtype=tokens.dtype).as_strided(tokens.shape, strides).copy_(tokens)
    )


def _mask(draw: random.Random, n: int, m: int, batch: int, much_to_choose: bool) -> AttentionMask:
    kinds = ["full", "causal", "offset", "local", "packed", "any"]
    kind = draw.choice(["full", "full", "full", "causal"] if much_to_choose else kinds)
    if kind == "full":
        return AttentionMask.full(n, m)
    if kind in ("causal", "offset", "local"):
        window, chunk = (
            draw.randint(1, 200) if kind == "local" and draw.random() < 0.7 else None for _ in "ab"
        )
        offset = draw.randint(-20, 70) if kind == "offset" or draw.random() < 0.3 else None
        return AttentionMask.causal(n, m, offset=offset, window=window, chunk=chunk)
    ends = sorted(draw.randint(0, m) for _ in range(draw.randint(1, 4)))
    if kind == "packed":  # queries of a text see the keys of that text
        text = torch.randint(len(ends), (1, n)).sort().values
        ends = torch.tensor([0, *ends])
        return AttentionMask(ends[text], ends[text + 1], m)
    ends = torch.tensor([[draw.randint(0, m) for _ in range(2 * n)] for _ in range(batch)])
    ends = ends.unflatten(1, (n, 2)).sort(-1).values
    return AttentionMask(ends[..., 0], ends[..., 1], m)


def _valid(draw: random.Random, batch: int, m: int, step: int) -> Tensor:
    """Padding on the left or the right, holes, or in one batch entry nothing else; in steps."""
    valid = torch.ones(batch, -(-m // step), dtype=torch.bool)
    for row in valid:
        count, kind = draw.randrange(len(row)), draw.choice(["left", "right", "holes", "none"])
        if kind == "left":
            row[:count] = False
        elif kind == "right":
            row[len(row) - count :] = False
        elif kind == "holes":
            row[draw.sample(range(len(row)), count)] = False
    if draw.random() < 0.05:
        valid[draw.randrange(batch)] = False
    return valid.repeat_interleave(step, 1)[:, :m]


@contextmanager
def launched_by(launcher: object) -> Iterator[None]:
    """``impl="triton"`` on CPU tensors, by this launcher; new memory holds NaN."""
    before = tuning.LAUNCHER, torch.are_deterministic_algorithms_enabled()
    tuning.LAUNCHER = launcher
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        tuning.LAUNCHER = before[0]
        torch.use_deterministic_algorithms(before[1])


def plainly(kernel, grid, arguments, settings):
    """The launcher for executor and interpreter."""
    kernel[grid](*arguments, **settings)


@contextmanager
def limits_of(setting: Setting) -> Iterator[None]:
    """See `Setting.limits`, `Setting.in_tiles` and `Setting.tight`."""
    table = tuning.table
    chunk = 32 if setting.queries[1] <= 16 else 8  # few queries take a quarter of it
    with (
        mock.patch.object(forward, "CHUNK", chunk if setting.limits else forward.CHUNK),
        mock.patch.object(backward, "CHUNK", chunk if setting.limits else backward.CHUNK),
        mock.patch.object(selection, "CANDIDATES", 32 if setting.limits else selection.CANDIDATES),
        mock.patch.object(
            selection, "LARGEST_TILE", 0 if setting.in_tiles else selection.LARGEST_TILE
        ),
        mock.patch.object(
            tuning, "table", lambda *asked: table(*asked)._replace(tight=setting.tight)
        ),
    ):
        yield


def on_random_calls(setting: Setting, examine: Callable[[Call], None], numbers: range) -> None:
    """Examines calls of a setting by the executor, until one fails; its error says which."""
    from triton_cpu import Executor

    for number in numbers:
        call = call_of(setting, number)
        with Executor(tf32=True, ones=False), launched_by(plainly), limits_of(setting):
            try:
                examine(call)
            except Exception as error:
                error.add_note(call.name)
                raise
