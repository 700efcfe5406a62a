"""The executor of Triton's IR: each operation against torch, and that it finds what it should."""

import os

import pytest
import torch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from triton_cpu import Executor, OutOfBounds  # noqa: E402

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def executor():
    torch.manual_seed(0)
    with Executor() as executor:
        yield executor


@triton.jit
def _arithmetic(x, y, out, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "mixed":
        c = a + b * a
        c = tl.where(a > b, c, -c)
        c = tl.maximum(tl.minimum(c, b), a) * 2 - b / (a * a + 1)
    elif OP == "integers":
        c = (a // b) * 3 + (a % b) - tl.maximum(a, b) + ((a & b) | 5) + ((a ^ b) << 2) + (a >> 1)
    elif OP == "functions":
        c = tl.exp(a) + tl.exp2(b) + tl.log(tl.abs(a) + 1) + tl.sqrt(tl.abs(b)) + tl.floor(a)
        c += tl.sin(a) + tl.cos(b) + tl.erf(a) + tl.rsqrt(tl.abs(a) + 1) + tl.fma(a, b, a)
    elif OP == "log2":
        c = tl.log2(tl.abs(a)) + tl.ceil(b) + tl.clamp(a, -0.5, 0.5)
    elif OP == "truth":
        c = ((a < b) & (a != b) | (a >= 3)).to(tl.float32) - (a <= b).to(tl.int32)
    elif OP == "bits":
        c = (a.to(tl.int32, bitcast=True) >> 3).to(tl.float32, bitcast=True)
    tl.store(out + i, c)


def _integers(a, b):
    trunc = torch.div(a, b, rounding_mode="trunc")
    rest = a - trunc * b
    return trunc * 3 + rest - torch.maximum(a, b) + ((a & b) | 5) + ((a ^ b) << 2) + (a >> 1)


EXPECTED = {
    "functions": lambda a, b: (
        (a.exp() + b.exp2() + (a.abs() + 1).log() + b.abs().sqrt() + a.floor() + a.sin() + b.cos())
        + (a.erf() + (a.abs() + 1).rsqrt() + (a * b + a))
    ),
    "log2": lambda a, b: a.abs().log2() + b.ceil() + a.clamp(-0.5, 0.5),
    "truth": lambda a, b: (((a < b) & (a != b)) | (a >= 3)).float() - (a <= b).int(),
    "bits": lambda a, b: (a.view(torch.int32) >> 3).view(torch.float32),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_functions(executor, name):
    a, b, out = torch.randn(64), torch.randn(64), torch.empty(64)
    _arithmetic[(1,)](a, b, out, OP=name, SIZE=64)
    torch.testing.assert_close(out, EXPECTED[name](a, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_types_round_as_torch_does(executor, dtype):
    """In float32, products and sums are fused, as on a GPU."""
    a, b = (torch.randn(256).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    _arithmetic[(1,)](a, b, out, OP="mixed", SIZE=256)
    c = a + b * a
    c = torch.where(a > b, c, -c)
    c = torch.maximum(torch.minimum(c, b), a) * 2
    c = (c.float() - b.float() / (a * a + 1).float()).to(dtype)  # so does Triton
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out, c, **close)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_integers_wrap_and_divide_as_in_c(executor, dtype):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    a = torch.randint(low, high, (256,), dtype=dtype)
    b = torch.randint(-9, 0, (256,), dtype=dtype)
    out = torch.empty_like(a)
    _arithmetic[(1,)](a, b, out, OP="integers", SIZE=256)
    assert torch.equal(out, _integers(a, b))


@triton.jit
def _control(x, counts, out, N, OP: tl.constexpr):
    p = tl.program_id(0)
    if p >= N:
        return
    n = tl.load(counts + p)
    total = 0.0
    if OP == "while":
        j = 0
        while (j < n) & (total < 10):
            total += tl.load(x + j)
            j += 1
    elif OP == "for":
        before = 0.0
        for j in range(n, 0, -1):
            total, before = before + tl.load(x + j - 1), total
    elif OP == "if":
        if n > 2:
            total = tl.load(x + n) * 2
        elif n == 2:
            total = -1.0
    tl.store(out + p, total)


def test_control_flow_and_early_return(executor):
    x, counts = torch.arange(8.0), torch.tensor([0, 3, 7, 2, 5], dtype=torch.int32)
    out = torch.full((5,), -9.0)
    for name, expected in {
        "while": [0, 3, 10, 1, -9],
        "for": [0, 2, 12, 0, -9],
        "if": [0, 6, 14, -1, -9],
    }.items():
        _control[(5,)](x, counts, out, 4, OP=name)
        if name == "for":
            expected = []
            for n in counts[:4].tolist():
                total = before = 0.0
                for j in range(n, 0, -1):
                    total, before = before + float(x[j - 1]), total
                expected.append(total)
            expected.append(-9)
        assert out.tolist() == expected


@triton.jit
def _along(x, out, OP: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    a = tl.load(x + i[:, None] * COLS + j[None, :])
    if OP == "cumsum":
        tl.store(out + i[:, None] * COLS + j[None, :], tl.cumsum(a, AXIS))
    elif OP == "cumsum back":
        tl.store(out + i[:, None] * COLS + j[None, :], tl.cumsum(a, AXIS, reverse=True))
    else:
        if OP == "sum":
            c = tl.sum(a, AXIS)
        elif OP == "max":
            c = tl.max(a, AXIS)
        else:
            c = tl.argmax(a, AXIS).to(tl.float32)
        tl.store(out + (j if AXIS == 0 else i), c)


@pytest.mark.parametrize("axis", [0, 1])
def test_along_an_axis(executor, axis):
    x = torch.randn(16, 64)
    for name, expected in {
        "sum": x.sum(axis),
        "max": x.amax(axis),
        "argmax": x.argmax(axis).float(),
        "cumsum": x.cumsum(axis),
        "cumsum back": x.flip(axis).cumsum(axis).flip(axis),
    }.items():
        out = torch.empty_like(expected)
        _along[(1,)](x, out, OP=name, AXIS=axis, ROWS=16, COLS=64)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@triton.jit
def _order(x, out, TOP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j, k = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :], tl.arange(0, TOP)[None, :]
    a = tl.load(x + i * COLS + j)
    tl.store(out + i * (COLS + TOP) + j, tl.sort(a))
    tl.store(out + i * (COLS + TOP) + COLS + k, tl.topk(a, TOP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_sort_and_the_largest(executor, dtype):
    x = (torch.randn(4, 32) * 1e9).to(dtype)
    out = torch.empty(4, 36, dtype=dtype)
    _order[(1,)](x, out, TOP=4, ROWS=4, COLS=32)
    assert torch.equal(out, torch.cat([x.sort().values, x.topk(4).values], 1))


@triton.jit
def _product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[:, None] * K + k[None, :])
    sums = tl.full([M, N], 1.0, tl.float32)
    sums = tl.dot(left, tl.trans(right), sums, input_precision=P)
    tl.store(out + m[:, None] * N + n[None, :], sums)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 32, 16), (16, 16, 128)])
def test_products(executor, dtype, shape):
    m, n, k = shape
    a, b, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.empty(m, n)
    _product[(1,)](a, b, out, *shape, P="ieee")
    torch.testing.assert_close(out.double(), a.double() @ b.double().T + 1, rtol=1e-5, atol=1e-5)


def test_tf32_only_where_asked_for():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a.double() @ b.double().T + 1
    errors = {}
    for tf32 in (False, True):
        for precision in ("ieee", "tf32", "tf32x3"):
            out = torch.empty(64, 64)
            with Executor(tf32=tf32):
                _product[(1,)](a, b, out, 64, 64, 64, P=precision)
            errors[tf32, precision] = float((out - exact).norm() / exact.norm())
    assert 1e-4 < errors.pop((True, "tf32")) < 1e-3
    assert errors[False, "tf32x3"] == errors[True, "ieee"] < errors[True, "tf32x3"]
    assert max(errors.values()) < 1e-6


@triton.jit
def _indirect(x, where, out, bins, B: tl.constexpr):
    i = tl.arange(0, B)
    values, places = tl.load(x + i), tl.load(where + i)
    tl.store(out + i, tl.gather(values, places, 0))
    tl.store(bins + tl.arange(0, 16), tl.histogram(places, 16))
    low, high = tl.split(tl.reshape(values, [B // 2, 2]))
    tl.store(out + B + i, tl.reshape(tl.join(high, low), [B]))


def test_gather_histogram_join_and_split(executor):
    x, where = torch.randn(64), torch.randint(0, 16, (64,), dtype=torch.int32)
    out, bins = torch.empty(128), torch.empty(16, dtype=torch.int32)
    _indirect[(1,)](x, where, out, bins, B=64)
    assert torch.equal(out[:64], x[where])
    assert torch.equal(bins, torch.bincount(where, minlength=16).int())
    assert torch.equal(out[64:], x.view(32, 2).flip(1).flatten())


@triton.jit
def _atomics(x, out, OP: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * B + i)
    if OP == "add":
        tl.atomic_add(out + i % 4, v, mask=i < B - 4)
    elif OP == "max":
        tl.atomic_max(out + i % 4, v)
    else:
        tl.atomic_cas(out, 0, 7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_atomics(executor, dtype):
    x, out = torch.arange(64).to(dtype), torch.zeros(4, dtype=dtype)
    _atomics[(4,)](torch.ones_like(x), out, OP="add", B=16)
    assert out.tolist() == [12] * 4
    if dtype != torch.bfloat16:
        _atomics[(4,)](x, out, OP="max", B=16)
        assert out.tolist() == [60, 61, 62, 63]
    if dtype == torch.int32:
        once = torch.zeros(1, dtype=dtype)
        _atomics[(4,)](x, once, OP="cas", B=16)
        assert once.tolist() == [7]


@triton.jit
def _described(x, out, N, D: tl.constexpr, B: tl.constexpr):
    p = tl.program_id(0)
    source = tl.make_tensor_descriptor(x, (N, D), (D, 1), (B, D))
    target = tl.make_tensor_descriptor(out, (N, D), (D, 1), (B, D))
    target.store([p * B, 0], source.load([p * B, 0]) * 2)


def test_tensor_descriptors(executor):
    x, out = torch.randn(50, 32), torch.zeros(50, 32)
    _described[(4,)](x, out, 50, D=32, B=16)
    assert torch.equal(out, 2 * x)


@triton.jit
def _shifted(x, out, N, SHIFT, OTHER: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if OTHER:
        a = tl.load(x + i + SHIFT, mask=i < N, other=0.0)
    else:
        a = tl.load(x + i + SHIFT, mask=i < N)
    tl.store(out + i, a, mask=i < N if OTHER else None)


def test_bytes_are_counted(executor):
    x, out = torch.randn(100), torch.empty(100)
    _shifted[(7,)](x, out, 100, 0, OTHER=True, B=16)
    (launch,) = executor.launches
    assert torch.equal(x, out)
    assert (launch.name, launch.grid) == ("_shifted", (7, 1, 1))
    assert launch.loaded_bytes == {"x": 400, "out": 0}
    assert launch.stored_bytes == {"x": 0, "out": 400}


@pytest.mark.parametrize(("shift", "lanes"), [(1, 4), (-1, 16)])
def test_accesses_outside_the_arguments_are_found(executor, shift, lanes):
    """Also where they end up in the memory next to it."""
    memory = torch.randn(300)
    with pytest.raises(OutOfBounds, match=f"_shifted: {lanes} accesses"):
        _shifted[(7,)](memory[100:200], torch.empty(112), 100, shift, OTHER=True, B=16)
    assert executor.launches == []


def test_lanes_without_a_value_show(executor):
    """On a GPU they hold what happens to be there."""
    out = torch.zeros(112)
    _shifted[(7,)](torch.randn(100), out, 100, 0, OTHER=False, B=16)
    assert out[:100].isfinite().all() and out[100:].isnan().all()


@triton.jit
def _sum_of(x, out, STEP, B: tl.constexpr):
    tl.store(out + tl.arange(0, B), tl.load(x + tl.arange(0, B) * STEP))


def test_launches_are_specialised_as_on_a_gpu(executor):
    """A step of 1 is a constant, and a number beyond 32 bits is one of 64."""
    x, out = torch.randn(256), torch.empty(16)
    for step in (1, 3, 16):
        _sum_of[lambda values: (1,)](x, out, step, B=16)
        assert torch.equal(out, x[: 16 * step : step])
    with pytest.raises(OutOfBounds):
        _sum_of[(1,)](x, out, 1 << 40, B=16)


@triton.jit
def _inline(x):
    tl.store(
        x, tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [tl.load(x)], tl.int32, True, 1)
    )


def test_unknown_operations_are_named(executor):
    with pytest.raises(NotImplementedError, match="elementwise_inline_asm"):
        _inline[(1,)](torch.zeros(1, dtype=torch.int32))
