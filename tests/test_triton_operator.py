"""The operator in Triton: gradients, corners of the selection, decoding, memory.

Random calls are in test_triton_random.py. Here, too, kernels' own IR runs on the CPU.
"""

from __future__ import annotations

import mmap
import os

import pytest
import torch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from mra_kernels import AttentionMask, KeyPyramid, MraAttentionConfig, mra_attention  # noqa: E402
from mra_kernels.testing import make_qkv  # noqa: E402
from triton_cases import UNIT, launched_by, plainly  # noqa: E402
from triton_cpu import Executor  # noqa: E402


@pytest.fixture(autouse=True)
def executor():
    with Executor(ones=False) as running, launched_by(plainly):
        yield running


def padded(n, left, right):
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, :left] = False
    valid[1, n - right :] = False
    return valid


GRADIENTS = {
    "pooled, left padding, sinks": (
        MraAttentionConfig((16, 1), 0.3, first_blocks=1),
        AttentionMask.causal(100).with_padding(padded(100, 37, 10), padded(100, 37, 10)),
        {"sinks": True},
        torch.float32,
        (24, 16),
    ),
    "pooled, half": (
        MraAttentionConfig((32, 1), 0.3),
        AttentionMask.causal(90, 150),
        {},
        torch.bfloat16,
        (64, 64),
    ),
    "per query, cap": (
        MraAttentionConfig((32, 1), 0.3, coarse="per_query"),
        AttentionMask.full(90, 150).with_padding(padded(150, 3, 70)),
        {"softcap": 3.0},
        torch.float32,
        (16, 16),
    ),
    "none, window": (
        MraAttentionConfig((64, 1), 0.1, coarse="none"),
        AttentionMask.causal(200, window=90),
        {},
        torch.float32,
        (32, 20),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    """Within what rounding explains of autograd through the float64 specification, same blocks."""
    config, mask, extras, dtype, (d, dv) = GRADIENTS[name]
    n, m = mask.n_queries, mask.n_keys
    tokens = [x.requires_grad_() for x in make_qkv(1, n=n, m=m, d=d, dv=dv, dtype=dtype)]
    if extras.get("sinks"):
        tokens.append(torch.linspace(-1, 2, 4).requires_grad_())

    def run(tensors, impl, selection=None):
        given = {**extras, "sinks": tensors[3]} if len(tensors) > 3 else extras
        return mra_attention(
            *tensors[:3], config=config, mask=mask, impl=impl, selection=selection, **given
        )

    result = run(tokens, "triton")
    grad = torch.randn(result.output.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad(result.output, tokens, grad.to(dtype))
    double = [x.detach().double().requires_grad_() for x in tokens]
    output = run(double, "reference", result.selection).output
    theirs = torch.autograd.grad(output, double, grad.to(dtype).double())
    for got, expected in zip(ours, theirs, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        # A few roundings of the dtype in products, and float32 in sums over a row.
        assert error <= 2 * UNIT[dtype] + 64 * UNIT[torch.float32], f"{error:.1e}"


def test_a_row_that_sees_nothing_passes_no_gradient_to_keys():
    tokens = [x.requires_grad_() for x in make_qkv(2, n=40, m=40, d=16, dv=16, dtype=torch.float32)]
    start = torch.zeros(1, 40, dtype=torch.int64)
    stop = start + 40
    stop[:, 5:9] = 0
    mask = AttentionMask(start, stop, 40)
    output = mra_attention(*tokens, config=MraAttentionConfig((16, 1)), mask=mask, impl="triton")
    assert (output.lse[:, :, 5:9] == -torch.inf).all()
    mean = tokens[2].mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 4, -1)
    torch.testing.assert_close(output.output[:, :, 5:9], mean)
    dq, dk, dv = torch.autograd.grad(output.output[:, :, 5:9].sum(), tokens)
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv, torch.full_like(dv, 2 * 4 / 40))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        ("integers", {}),
        ("all equal", {}),
        ("padding rows", {}),
        ("integers", {"scope": "row"}),
        ("padding rows", {"score": "mu", "blocks_per_row": 3}),
        ("queries before keys", {"first_blocks": 1, "query_rows": 32, "diagonal_blocks": 0}),
    ],
)
def test_ties_are_broken_as_the_specification_does(inputs, change, at_once, monkeypatch, executor):
    """Scores that are exact in any order of summation, many of them equal, and hardly any room to
    write candidates down, so that every way of searching is taken; and all of them in one tile."""
    from mra_kernels._triton import selection

    monkeypatch.setattr(selection, "CANDIDATES", 16)
    monkeypatch.setattr(selection, "LARGEST_TILE", 2048 * 16 if at_once else 0)
    # 14 is what is tallied of 2^16 pairs; the bits left are no multiple of three.
    monkeypatch.setattr(selection, "first_bits", lambda pairs: 12 if inputs == "integers" else 14)
    if at_once:
        change = {**change, "query_rows": 32}
    generator = torch.Generator().manual_seed(5)
    query, key = (
        torch.randint(-3, 4, (2, 2, 640, 16), generator=generator).float() for _ in range(2)
    )
    mask = AttentionMask.causal(640)
    if inputs == "all equal":
        query, key = torch.ones_like(query), torch.ones_like(key)
        mask = AttentionMask.full(640, 640)
    elif inputs == "queries before keys":
        mask = AttentionMask.causal(640, offset=-1)
    elif inputs == "padding rows":
        valid = torch.ones(2, 640, dtype=torch.bool)
        valid[0, :320] = False
        mask = AttentionMask.full(640, 640).with_padding(valid, valid)
    config = MraAttentionConfig((16, 1), 0.2, **{"diagonal_blocks": 1, **change})
    call = {"config": config, "mask": mask, "scaling": 0.5}
    ours = mra_attention(query, key, key, impl="triton", **call).selection
    assert len(executor.launches) == (3 if at_once else 4)
    if not at_once:
        _, threshold, opener, _ = executor.launches
        # The best of each row, and at most three bits of a key's 60 at a time, on top of the first.
        sweeps = threshold.loaded_bytes["K_MEANS"] / opener.loaded_bytes["K_MEANS"]
        assert sweeps <= 2 + 20, f"{sweeps:.1f} sweeps over all pairs"
    theirs = mra_attention(query, key, key, impl="reference", **call).selection
    for a, b in ((ours.fine, theirs.fine), (ours.coarse[0], theirs.coarse[0])):
        for field in ("head", "row", "col", "legal", "logit"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert torch.equal(ours.density, theirs.density)
    assert torch.equal(ours.forced, theirs.forced)
    assert ours.dot_products == theirs.dot_products


def test_kernels_agree_on_every_score(monkeypatch):
    """All are equal, being less the best of rows of one block, and nothing is paid for. A random
    call: a kernel that fused a product of the soft-cap's with a sum, where another did not, opened
    a block."""
    from mra_kernels._triton import selection

    monkeypatch.setattr(selection, "LARGEST_TILE", 0)
    generator = torch.Generator().manual_seed(3315887296)
    query = 40 * torch.randn(2, 4, 129, 128, generator=generator)
    key = 2 * torch.randn(2, 2, 63, 128, generator=generator)
    call = {"config": MraAttentionConfig((64, 1), 0.01), "scaling": 0.125, "softcap": 3.0}
    chosen = mra_attention(query.half(), key.half(), key.half(), impl="triton", **call).selection
    assert not chosen.density.any()


@pytest.mark.parametrize("coarse", ["pooled", "per_query"])
def test_decoding_from_a_kept_pyramid(coarse, executor):
    """Token by token and in chunks: the same as without one, and as the specification."""
    config = MraAttentionConfig((16, 1), 0.1, coarse=coarse, diagonal_blocks=1)
    _, key, value = make_qkv(3, n=1, m=1300, d=32, dv=16, dtype=torch.float32)
    queries = torch.randn(2, 4, 1300, 32, generator=torch.Generator().manual_seed(1))
    valid = padded(1300, 50, 0)
    pyramid, length = KeyPyramid((16,)), 0
    for step in (1280, 1, 16, 3):
        length += step
        mask = AttentionMask.causal(step, length).with_padding(valid[:, :length])
        keys, values = key[:, :, :length], value[:, :, :length]
        pyramid.extend(keys, values, valid[:, :length])
        if step > 16:
            continue
        query = queries[:, :, length - step : length]
        call = {"config": config, "mask": mask}
        with torch.no_grad():
            executor.launches.clear()
            kept = mra_attention(query, keys, values, impl="triton", pyramid=pyramid, **call)
        assert len(executor.launches) <= 4
        assert executor.launches[-1].grid[2] > 1, "keys are split among programs"
        exact = mra_attention(
            query.double(), keys.double(), values.double(), impl="reference",
            selection=kept.selection, **call,
        )  # fmt: skip
        torch.testing.assert_close(kept.output.double(), exact.output, rtol=2e-5, atol=2e-5)
        alone = mra_attention(query, keys, values, impl="triton", **call)
        assert torch.equal(kept.output, alone.output)


def test_views_need_no_copies(executor):
    packed = torch.randn(2, 90, 3, 4, 16)
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    config = MraAttentionConfig((32, 1), 0.4, coarse="none")
    ours = mra_attention(query, key, value, config=config, impl="triton").output
    given = {x.data_ptr() for x in (query, key, value)}
    used = {x.data_ptr() for x in executor.launches[-1].values.values() if torch.is_tensor(x)}
    assert given <= used
    whole = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(ours, mra_attention(*whole, config=config, impl="triton").output)


def test_tiles_of_128_rows_over_blocks_of_32(executor, monkeypatch):
    """Four rows of blocks share a tile, and each sees only what it opened itself."""
    from mra_kernels._triton import tuning

    for kernel in ("forward", "backward_query", "backward_key"):
        wide = tuning.Tiles(128, 128, 8, 2, tight=True)
        monkeypatch.setitem(tuning.OVERRIDES, (kernel, 16, torch.float32), wide)
    tokens = [x.requires_grad_() for x in make_qkv(5, n=300, m=300, d=16, dtype=torch.float32)]
    config, mask = MraAttentionConfig((32, 1), 0.2), AttentionMask.causal(300)
    ours = mra_attention(*tokens, config=config, mask=mask, impl="triton")
    assert executor.launches[-1].grid[0] == 3
    exact = mra_attention(
        *tokens, config=config, mask=mask, impl="reference", selection=ours.selection
    )
    torch.testing.assert_close(ours.output, exact.output, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(x.output.square().sum(), tokens) for x in (ours, exact))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 33), (65, 1), (16, 17)])
def test_tiny(n, m):
    tokens = make_qkv(0, n=n, m=m, d=16, dv=16, dtype=torch.float32)
    config = MraAttentionConfig((16, 1), 0.5)
    ours = mra_attention(*tokens, config=config, impl="triton")
    exact = mra_attention(
        *(x.double() for x in tokens), config=config, impl="reference", selection=ours.selection
    )
    torch.testing.assert_close(ours.output.double(), exact.output, rtol=1e-5, atol=1e-5)


def far_apart(*shape, strides):
    """Half-precision zeros in memory that takes room only where it is written; random calls have
    tokens far apart, too, but neither heads nor batch entries."""
    size = 2 * (1 + sum((extent - 1) * step for extent, step in zip(shape, strides, strict=True)))
    reserve_nothing = 0x4000  # MAP_NORESERVE of Linux
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides)


def test_offsets_beyond_32_bits():
    """Of tokens, heads and batch entries, in both passes."""
    given = make_qkv(4, heads=2, kv_heads=2, n=300, m=90, d=16, dv=16, dtype=torch.float16)
    tokens = [
        far_apart(*given[0].shape, strides=(64, 32, 1 << 23, 1)),
        far_apart(*given[1].shape, strides=(16, (1 << 32) + 48, 32, 1)),
        far_apart(*given[2].shape, strides=((1 << 31) + 16, 1 << 12, 16, 1)),
    ]
    for far, near in zip(tokens, given, strict=True):
        far.copy_(near)
    config = MraAttentionConfig((16, 1), 0.3, coarse="per_query")
    results = []
    for leaves in (tokens, given):
        leaves = [x.detach().requires_grad_() for x in leaves]
        output = mra_attention(*leaves, config=config, impl="triton").output
        results.append((output, *torch.autograd.grad(output.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_programs_may_run_in_any_order():
    """No result depends on who adds first, or who comes last: there are no sums in memory of
    anything but whole numbers."""
    from triton_cases import BY_NAME, call_of, limits_of
    from triton_oracle import attend, gradients

    for name, numbers in {"mra2 padded": range(6), "few queries": range(8)}.items():
        for call in (call_of(BY_NAME[name], number) for number in numbers):
            runs = []
            for backwards in (False, True):
                with Executor(ones=False, backwards=backwards), limits_of(call.setting):
                    if call.setting.gradients:
                        result, grads = gradients(call, call.tokens)
                    else:
                        result, grads = attend(call, call.tokens), ()
                runs.append((result.output, result.lse, *grads))
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), call.name
