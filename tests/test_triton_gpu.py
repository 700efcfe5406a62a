"""The kernels on a GPU: numbers against float64, time against torch's own attention, memory."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mra_kernels import (
    AttentionMask,
    KeyPyramid,
    MraAttentionConfig,
    MraKeysConfig,
    mra_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs on a GPU"),
]
pytest.importorskip("triton")

import triton_keys_cases  # noqa: E402
from triton_cases import SETTINGS, call_of  # noqa: E402
from triton_oracle import check, check_gradients  # noqa: E402

CONFIG = MraAttentionConfig(resolutions=(64, 1), budget=0.1)
CASES = int(os.environ.get("MRA_KERNEL_CASES", "40"))


def on_gpu(value):
    """Tensors of a call, a mask or a dictionary, moved; strides stay as they were."""
    if isinstance(value, torch.Tensor):
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        # Entries that share memory have the same number.
        return moved.copy_(value) if 0 not in value.stride() else value.cuda().expand_as(value)
    if isinstance(value, (tuple, list)):
        return type(value)(on_gpu(x) for x in value)
    if isinstance(value, dict):
        return {key: on_gpu(x) for key, x in value.items()}
    if isinstance(value, AttentionMask):
        fields = dataclasses.fields(value)
        return AttentionMask(**{f.name: on_gpu(getattr(value, f.name)) for f in fields})
    return value


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_numbers(setting):
    """The calls, the oracle and the tolerance of the tests that need no GPU."""
    for number in range(CASES if setting.limits else 3):
        call = call_of(setting, number)
        moved = {"tokens": on_gpu(call.tokens), "mask": on_gpu(call.mask)}
        call = dataclasses.replace(call, **moved, extras=on_gpu(call.extras))
        try:
            check(call)
            if setting.gradients:
                check_gradients(call)
        except Exception as error:
            error.add_note(call.name)
            raise


@pytest.mark.parametrize("setting", triton_keys_cases.SETTINGS, ids=lambda setting: setting.name)
def test_single_keys(setting):
    """Numbers as above; of the choice, one key in 500 may differ where estimates round."""
    for number in range(30):
        call = triton_keys_cases.drawn(setting, number)
        moved = {name: on_gpu(getattr(call, name)) for name in ("tokens", "mask", "extras")}
        call = dataclasses.replace(call, **moved)
        result = triton_keys_cases.attended(call, "triton")
        triton_keys_cases.check_output(call, result)
        theirs = triton_keys_cases.attended(call, "reference").selection.opened()
        assert (result.selection.opened() != theirs).double().mean() < 2e-3, call.name


def qkv(n, width=64, heads=32, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(n)
    return [
        torch.randn(1, heads, n, width, device="cuda", dtype=dtype, generator=generator)
        for _ in range(3)
    ]


def attend(*tokens, config=CONFIG, **more):
    return mra_attention(*tokens, config=config, impl="triton", **more)


def test_a_graph_replays_both_passes():
    """Also of numbers, and of a mask with padding, that came after it was captured."""
    leaves = [x.requires_grad_() for x in qkv(1024, heads=4)]
    valid = torch.ones(1, 1024, dtype=torch.bool, device="cuda")
    valid[:, :100] = False

    def both():
        mask = AttentionMask.causal(1024, device="cuda").with_padding(valid, valid)
        output = attend(*leaves, mask=mask).output
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # kernels are compiled
        both()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
        valid[:, :200] = False
    graph.replay()
    for replayed, expected in zip(captured, both(), strict=True):
        assert torch.equal(replayed, expected)


def test_twice_the_same():
    leaves = [x.requires_grad_() for x in qkv(4096)]
    first, second = (
        (x, *torch.autograd.grad(x.square().sum(), leaves))
        for x in (attend(*leaves).output for _ in "ab")
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast():
    tokens = qkv(512, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        output = attend(*tokens).output
        assert output.dtype == scaled_dot_product_attention(*tokens).dtype == torch.bfloat16
    assert torch.equal(output, attend(*(x.bfloat16() for x in tokens)).output)


def test_compiled():
    leaves = [x.requires_grad_() for x in qkv(512)]
    graph = torch.compile(lambda *x: attend(*x).output, fullgraph=True)
    grads = (
        torch.autograd.grad(call(*leaves).float().square().sum(), leaves)
        for call in (graph, lambda *x: attend(*x).output)
    )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_all_blocks_are_exact_attention(dtype):
    """Against torch's own, to a few units of rounding; `test_numbers` is stricter."""
    tokens = qkv(1000, heads=4, dtype=dtype)
    whole = dataclasses.replace(CONFIG, budget=1.0)
    mask = AttentionMask.causal(1000, device="cuda")
    exact = scaled_dot_product_attention(*(x.double() for x in tokens), is_causal=True)
    error = (attend(*tokens, config=whole, mask=mask).output.double() - exact).abs().max()
    theirs = scaled_dot_product_attention(*tokens, is_causal=True).double()
    assert error <= 2 * (theirs - exact).abs().max() + 4 * torch.finfo(dtype).eps


def milliseconds(call):
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=300)


def compared(name, ours, theirs):
    """Times of two calls, said and told."""
    times = milliseconds(ours), milliseconds(theirs)
    print(f"{torch.cuda.get_device_name()}: {name} {times[0]:.3f} ms, exact {times[1]:.3f} ms")
    return times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_faster_than_exact_attention_at_16k(dtype):
    """kernels/PREDICTIONS.md predicts by how much, for two kinds of GPUs."""
    tokens = qkv(16384, dtype=dtype)
    ours, theirs = compared(
        f"forward, {dtype}",
        lambda: attend(*tokens),
        lambda: scaled_dot_product_attention(*tokens),
    )
    assert ours < theirs


def test_single_keys_beside_plain_torch_and_exact_attention():
    """kernels/PREDICTIONS.md predicts that exact attention is faster; plain torch must not be."""
    tokens, config = qkv(4096, heads=8), MraKeysConfig(budget=0.1)
    with torch.no_grad():
        ours, _ = compared(
            "single keys",
            lambda: attend(*tokens, config=config),
            lambda: scaled_dot_product_attention(*tokens),
        )
        plain = milliseconds(lambda: mra_attention(*tokens, config=config, impl="reference"))
    assert ours < plain


def test_a_training_step_is_faster_at_16k():
    leaves = [x.requires_grad_() for x in qkv(16384)]

    def step(output):
        return torch.autograd.grad(output, leaves, output.detach())

    ours, theirs = compared(
        "both passes",
        lambda: step(attend(*leaves).output),
        lambda: step(scaled_dot_product_attention(*leaves)),
    )
    assert ours < theirs


def test_decoding_from_a_kept_pyramid():
    """One query against 64k keys: right, and how long beside exact attention."""
    query, (_, key, value) = qkv(1)[0], qkv(65536)
    pyramid = KeyPyramid(CONFIG.resolutions[:1])
    pyramid.extend(key, value)
    mask = AttentionMask.causal(1, 65536, device="cuda")
    with torch.no_grad():
        kept = attend(query, key, value, mask=mask, pyramid=pyramid)
        assert torch.equal(kept.output, attend(query, key, value, mask=mask).output)
        compared(
            "decoding",
            lambda: attend(query, key, value, mask=mask, pyramid=pyramid),
            lambda: scaled_dot_product_attention(query, key, value),
        )


@pytest.mark.parametrize("grad", [False, True])
def test_memory_grows_with_the_length(grad):
    """Beyond inputs and output: means, bits and lists, no matrix of scores."""
    extra = {}
    for n in (16384, 65536):
        tokens = [x.requires_grad_(grad) for x in qkv(n, heads=8)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = attend(*tokens).output
        if grad:
            output.backward(torch.ones_like(output))
        extra[n] = torch.cuda.max_memory_allocated() - before
        del tokens, output
    assert extra[65536] < 6 * extra[16384]
    assert extra[65536] < (12 if grad else 4) * 8 * 65536 * 64 * 2
