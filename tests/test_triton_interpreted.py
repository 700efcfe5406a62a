"""The kernels in Triton's interpreter: a second opinion, in a few small calls."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 (make test-kernels)"
    ),
]
pytest.importorskip("triton")

from mra_kernels import AttentionMask, MraAttentionConfig, MraKeysConfig, mra_attention  # noqa: E402
from mra_kernels.testing import make_qkv  # noqa: E402


@pytest.fixture(autouse=True)
def repaired():
    import interpreter

    interpreter.install()


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance", "in_tiles"),
    [
        (MraAttentionConfig((64, 1), 0.3), torch.float32, 1e-5, True),
        (
            MraAttentionConfig((32, 1), 0.3, coarse="per_query", scope="row"),
            torch.bfloat16,
            0.03,
            True,
        ),
        (
            MraAttentionConfig((16, 1), 0.2, coarse="none", first_blocks=1),
            torch.float16,
            0.003,
            False,
        ),
        (MraAttentionConfig((32, 1), 0.3, query_rows=128), torch.float32, 1e-5, False),
    ],
    ids=["pooled", "per query", "none", "shared lists"],
)
def test_forward_and_backward(config, dtype, tolerance, in_tiles, monkeypatch):
    if in_tiles:  # blocks are chosen by several programs a head, as in long sequences
        monkeypatch.setattr("mra_kernels._triton.selection.LARGEST_TILE", 0)
    tokens = make_qkv(4, batch=1, heads=2, kv_heads=1, n=150, m=150, d=24, dv=16, dtype=dtype)
    tokens = [x.requires_grad_() for x in tokens]
    mask = AttentionMask.causal(150)
    result = mra_attention(*tokens, config=config, mask=mask, impl="triton")
    double = [x.detach().double().requires_grad_() for x in tokens]
    exact = mra_attention(
        *double, config=config, mask=mask, impl="reference", selection=result.selection
    )
    torch.testing.assert_close(result.output.double(), exact.output, rtol=0, atol=tolerance)
    grad = torch.ones_like(result.output)
    ours = torch.autograd.grad(result.output, tokens, grad)
    theirs = torch.autograd.grad(exact.output, double, grad.double())
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_single_keys():
    """The same keys as the specification's, and their sums."""
    tokens = make_qkv(4, batch=1, heads=2, kv_heads=1, n=100, m=100, d=24, dv=16)
    tokens = [x.float() for x in tokens]
    given = {"config": MraKeysConfig(budget=0.3, rank=8), "mask": AttentionMask.causal(100)}
    result = mra_attention(*tokens, impl="triton", **given)
    double = [x.double() for x in tokens]
    exact = mra_attention(*double, impl="reference", selection=result.selection, **given)
    torch.testing.assert_close(result.output.double(), exact.output, rtol=0, atol=1e-5)
    chosen = mra_attention(*tokens, impl="reference", **given).selection
    assert (result.selection.opened() != chosen.opened()).double().mean() < 1e-3
