"""The interpreter, repaired, against torch: it is the second opinion on every kernel."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 (make test-kernels)"
    ),
]
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402


@pytest.fixture(autouse=True)
def repaired():
    import interpreter

    interpreter.install()
    torch.manual_seed(0)


@triton.jit
def _mixed(x, y, product, out, SIDE: tl.constexpr):
    i = tl.arange(0, SIDE)
    at = i[:, None] * SIDE + i[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(product + at, tl.dot(a, tl.trans(b)))
    c = a + b * a
    c = tl.where(a > b, c, -c)
    tl.store(out + at, tl.maximum(c, b) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_round_once_and_the_rest_after_each_operation(dtype):
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    product, out = torch.empty(32, 32), torch.empty(32, 32, dtype=dtype)
    _mixed[(1,)](a, b, product, out, SIDE=32)
    torch.testing.assert_close(product, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    c = a + b * a
    assert torch.equal(out, torch.maximum(torch.where(a > b, c, -c), b) * 2)


@triton.jit
def _cast(x, out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)).to(out.dtype.element_ty))


def test_bfloat16_is_rounded_to_even():
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32)
    x, out = bits.view(torch.float32), torch.empty(4096, dtype=torch.bfloat16)
    _cast[(1,)](x, out, SIZE=4096)
    expected = x.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))
    back = torch.empty(4096)
    _cast[(1,)](out, back, SIZE=4096)
    assert torch.equal(back.nan_to_num(0), out.float().nan_to_num(0))


def _small(name, n, m, mask, packed=True):
    """A call of a few tiles."""
    from mra_kernels.testing import make_qkv
    from triton_cases import BY_NAME, Call

    setting = BY_NAME[name]
    tokens = make_qkv(1, 1, setting.group, 1, n, m, *setting.widths, torch.float32)
    extras = {"scaling": 0.125, "softcap": setting.softcap}
    if setting.sinks:
        extras["sinks"] = torch.linspace(-1, 3, setting.group)
    if setting.padded:
        valid = torch.ones(1, m, dtype=torch.bool)
        valid[0, :21] = False
        mask = mask.with_padding(valid, valid if n == m else None)
    tokens = tuple(x.to(setting.dtype) for x in tokens)
    return Call(setting, name, tokens, mask, setting.config, extras)


@pytest.mark.parametrize(
    ("name", "n", "m", "causal"),
    [
        ("mra2", 100, 130, False),
        ("mra2 padded", 96, 96, True),
        ("per query", 130, 130, True),
        ("priors", 70, 70, True),
        ("block per row", 100, 100, False),
        ("sparse only", 65, 200, False),
        ("few queries", 3, 150, False),
    ],
)
def test_the_interpreter_agrees(name, n, m, causal):
    """On the kernels as Python: not the IR that the other tests run, and not our C."""
    from mra_kernels import AttentionMask
    from triton_cases import launched_by, plainly
    from triton_oracle import check, check_gradients

    mask = AttentionMask.causal(n, m) if causal else AttentionMask.full(n, m)
    call = _small(name, n, m, mask)
    with launched_by(plainly):
        check(call)
        if call.setting.gradients:
            check_gradients(call)
