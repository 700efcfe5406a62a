"""Random calls of the Triton kernels for single keys, each known by its setting and a number.

The choice is judged by the specification's own rules, given what the kernels' log-sum-exps came to
(sums in another order may round to the next whole number); the output by float64, given the choice.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from mra_kernels import AttentionMask, MraKeysConfig, MraResult, keys, mra_attention
from mra_kernels._triton import keys as keys_launches
from mra_kernels._triton.keys_estimate import SILENT
from mra_kernels.features import ByteFeatures
from mra_kernels.keys import choose_keys
from mra_kernels.pyramid import each_row, tiled_rows
from mra_kernels.scores import ScoreRule
from mra_kernels.testing import make_qkv
from triton_cases import UNIT, launched_by, plainly
from triton_cpu import Executor


@dataclass(frozen=True)
class Setting:
    """What kernels are compiled for, and the lengths they are tried at.

    Attributes:
        widths: Of queries and keys, and of values.
        group: Query heads per key head.
        lengths: The shortest and the longest, of queries and of keys.
    """

    name: str
    dtype: torch.dtype
    widths: tuple[int, int]
    group: int
    config: MraKeysConfig
    softcap: float | None = None
    sinks: bool = False
    padded: bool = False
    lengths: tuple[int, int] = (17, 700)


SETTINGS = [
    Setting("mra", torch.bfloat16, (64, 64), 2, MraKeysConfig(), padded=True, sinks=True),
    Setting("odd widths", torch.float32, (40, 24), 1, MraKeysConfig(rank=33)),
    Setting(
        "soft-cap, wide blocks",
        torch.float16,
        (16, 80),
        3,
        MraKeysConfig(rows=64, first_keys=0),
        softcap=3.0,
        padded=True,
    ),
    Setting(
        "few queries",
        torch.float32,
        (40, 24),
        1,
        MraKeysConfig(rank=33, head_budgets=(0.05, 0.4)),
        lengths=(1, 16),
    ),
]
BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Call:
    """One call, in tensors that may be views."""

    name: str
    tokens: tuple[Tensor, Tensor, Tensor]
    mask: AttentionMask
    config: MraKeysConfig
    extras: dict[str, object]


def drawn(setting: Setting, number: int) -> Call:
    """Shapes, masks, padding, budgets and numbers."""
    draw = random.Random(f"{setting.name} {number}")
    batch, kv_heads = draw.randint(1, 2), draw.randint(1, 2)
    if setting.config.head_budgets:
        kv_heads = len(setting.config.head_budgets) // setting.group
    low, high = setting.lengths
    n = draw.randint(low, high)
    m = n if draw.random() < 0.5 else draw.randint(1, max(high, 700))
    heads, (d, dv) = kv_heads * setting.group, setting.widths
    tokens = make_qkv(draw.randint(0, 2**16), batch, heads, kv_heads, n, m, d, dv, torch.float32)
    if draw.random() < 0.3:  # many keys are equally far
        tokens = (tokens[0] * 0.01, tokens[1], tokens[2])
    if draw.random() < 0.5:  # heads beside each other, as projections leave them
        tokens = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens)
    mask = draw.choice(
        [
            AttentionMask.full(n, m),
            AttentionMask.causal(n, m),
            AttentionMask.causal(n, m, offset=draw.randint(0, 70)),
            AttentionMask.causal(n, m, window=draw.randint(1, 300)),
            AttentionMask.causal(n, m, chunk=draw.randint(1, 300)),
        ]
    )
    if setting.padded:
        valid = torch.ones(batch, m, dtype=torch.bool)
        for row in valid:
            count = draw.randint(0, m - 1) * draw.randint(0, 1)
            row[slice(0, count) if draw.random() < 0.5 else slice(m - count, m)] = False
        mask = mask.with_padding(valid, valid if n == m else torch.ones(1, n, dtype=torch.bool))
    config = setting.config
    if not config.head_budgets:
        budget = draw.choice([0.01, 0.1, 0.25, 0.7, 1.0])
        config = dataclasses.replace(config, budget=budget)
    extras: dict[str, object] = {"scaling": draw.choice([0.125, 0.03125])}
    if setting.softcap is not None:
        extras["softcap"] = setting.softcap
    if setting.sinks:
        extras["sinks"] = torch.linspace(-1, 3, heads)
    name = f"{setting.name!r} number {number}: {n} x {m}, {config}"
    return Call(name, tuple(x.to(setting.dtype) for x in tokens), mask, config, extras)


def attended(call: Call, impl: str, **more: object) -> MraResult:
    """What an implementation makes of the call."""
    given = {"config": call.config, "mask": call.mask, "impl": impl, **call.extras, **more}
    return mra_attention(*call.tokens, **given)


def check(call: Call) -> None:
    """Choice, its figures, output and lse of the kernels' IR, run on the CPU."""
    # Lists so short that calls of hundreds of keys fill several.
    short = mock.patch.object(keys_launches, "CHUNK", 64)
    with Executor(ones=False) as executor, launched_by(plainly), torch.no_grad(), short:
        result = attended(call, "triton")
    (zero,) = (x.values["ZERO"] for x in executor.launches if x.name == "estimate_kernel")
    _check_choice(call, result, zero.view(call.tokens[0].shape[:3]).float())
    check_output(call, result)


def check_output(call: Call, result: MraResult) -> None:
    """Output and lse, given the choice; each entry within what rounding explains."""
    query, key, value = (x.double() for x in call.tokens)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.extras.items()}
    wide = dataclasses.replace(call, tokens=(query, key, value), extras=double)
    exact = attended(wide, "reference", selection=result.selection)
    wide = dataclasses.replace(wide, tokens=(query, key, value.abs()))
    scale = attended(wide, "reference", selection=result.selection).output
    unit, single = UNIT[call.tokens[2].dtype], UNIT[torch.float32]
    logits = float(call.extras["scaling"] * query.norm(dim=-1).max() * key.norm(dim=-1).max())
    # Weights are rounded once, for the product with the values, and the result once.
    allowed = (unit + 32 * single * (1 + logits)) * scale + unit * exact.output.abs() + 1e-7
    assert not result.output.isnan().any(), call.name
    worst = float(((result.output.double() - exact.output).abs() / allowed).max())
    assert worst <= 1, f"{call.name}: {worst:.1f} times the error that rounding explains"
    assert torch.equal(result.lse.isinf(), exact.lse.isinf()), call.name
    error = float((result.lse.double() - exact.lse).abs().nan_to_num(0).max())
    assert error <= 64 * single * (1 + logits), f"{call.name}: lse off by {error}"


def _check_choice(call: Call, result: MraResult, zero: Tensor) -> None:
    """The same keys, and the same figures."""
    query, key, _ = (x.float() for x in call.tokens)
    rule = ScoreRule(call.extras["scaling"], call.extras.get("softcap"))
    ours = result.selection
    with _log_sums(zero) as off:
        theirs = choose_keys(query, key, call.mask, call.config, rule)
    assert max(off) <= 1, f"{call.name}: a log-sum-exp is off by {max(off)} units"
    wrong = (ours.opened() != theirs.opened()).nonzero()
    assert not len(wrong), f"{call.name}: {len(wrong)} keys, {wrong[0].tolist()} the first"
    assert ours.counts == theirs.counts, call.name
    torch.testing.assert_close(ours.density, theirs.density.float())
    torch.testing.assert_close(ours.forced, theirs.forced.float())


@contextmanager
def _log_sums(zero: Tensor) -> Iterator[list[float]]:
    """The specification with these log-sum-exps in its distances; how far its own are from them."""
    off = [0.0]

    def distances(
        features: ByteFeatures, block, mask: AttentionMask, config: MraKeysConfig, rule: ScoreRule
    ) -> Tensor:
        rows = slice(block.first, block.last)
        own, takes_off = features.query[:, :, rows], zero[:, :, rows, None]
        unit = features.unit[:, :, block.first // config.rows : -(-block.last // config.rows), None]
        of_row = each_row(unit, own, config.rows)
        logits = (own @ features.key.mT).masked_fill(~block.visible[:, None], -torch.inf)
        scores = (logits * of_row + keys._log_weights(block, mask, config, logits)).double()
        expected = (scores.logsumexp(-1, keepdim=True) / of_row).round()
        silent = takes_off == SILENT.value
        speaks = block.counted[:, None, :, None] & (expected > -torch.inf)
        assert torch.equal(silent, ~speaks)
        off.append(float((takes_off + expected).abs().masked_fill(silent, 0).max()))
        below = (logits + takes_off).masked_fill(silent, -torch.inf)
        nearest = tiled_rows(below, config.rows, -torch.inf).amax(3) * unit
        away = (-keys.STEPS_PER_NAT * nearest.clamp(min=-keys.FARTHEST)).floor()
        steps = away.clamp(0, keys.FARTHEST - 1) + 1
        place = torch.arange(mask.n_keys)
        favoured = place < keys._first_key(mask, place.device) + config.first_keys
        return steps.masked_fill(favoured[:, None, None], 0).to(torch.uint8)

    with mock.patch.object(keys, "_distances", distances):
        yield off
