"""The kernels on a GPU: numbers against float64, time against torch's own attention, memory."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mra_kernels import AttentionMask, MraAttentionConfig, MraKeysConfig, mra_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs on a GPU"),
]
pytest.importorskip("triton")

import triton_keys_cases  # noqa: E402
from triton_cases import SETTINGS, calls, check, check_gradients  # noqa: E402

CONFIG = MraAttentionConfig(resolutions=(64, 1), budget=0.1)


def on_gpu(value):
    """Tensors of a call, a mask or a dictionary, moved."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
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

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        call = data.draw(calls(setting))
        moved = {"tokens": on_gpu(call.tokens), "mask": on_gpu(call.mask)}
        call = dataclasses.replace(call, **moved, extras=on_gpu(call.extras))
        check(call)
        if setting.gradients:
            check_gradients(call)

    run()


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


def qkv(n, width=64, heads=32):
    return torch.randn(3, 1, heads, n, width, device="cuda", dtype=torch.bfloat16).unbind()


def milliseconds(call):
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=300)


def test_faster_than_exact_attention_at_16k():
    """kernels/PREDICTIONS.md predicts by how much, for two kinds of GPUs."""
    query, key, value = qkv(16384)
    exact = torch.nn.functional.scaled_dot_product_attention
    ours = milliseconds(lambda: mra_attention(query, key, value, config=CONFIG, impl="triton"))
    theirs = milliseconds(lambda: exact(query, key, value))
    print(f"{torch.cuda.get_device_name()}: {ours:.3f} ms, exact {theirs:.3f} ms")
    assert ours < theirs


def test_single_keys_beside_plain_torch_and_exact_attention():
    """kernels/PREDICTIONS.md predicts that exact attention is faster; plain torch must not be."""
    query, key, value = qkv(4096, heads=8)
    exact = torch.nn.functional.scaled_dot_product_attention
    given = {"config": MraKeysConfig(budget=0.1)}
    with torch.no_grad():
        ours, plain = (
            milliseconds(lambda impl=impl: mra_attention(query, key, value, impl=impl, **given))
            for impl in ("triton", "reference")
        )
    theirs = milliseconds(lambda: exact(query, key, value))
    name = torch.cuda.get_device_name()
    print(f"{name}: {ours:.3f} ms, plain torch {plain:.3f} ms, exact {theirs:.3f} ms")
    assert ours < plain


def test_memory_grows_with_the_length():
    """Beyond inputs and output: means, bits and lists, no matrix of scores."""
    extra = {}
    for n in (16384, 65536):
        query, key, value = qkv(n, heads=8)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mra_attention(query, key, value, config=CONFIG, impl="triton")
        extra[n] = torch.cuda.max_memory_allocated() - before
        del query, key, value
    assert extra[65536] < 6 * extra[16384]
    assert extra[65536] < 4 * 8 * 65536 * 64 * 2
