"""The kernels as one operator of torch: compiled, exported, cast, differentiated, captured."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from mra_kernels import AttentionMask, MraAttentionConfig, MraKeysConfig, mra_attention  # noqa: E402
from mra_kernels.testing import make_qkv  # noqa: E402
from triton_cases import launched_by, plainly  # noqa: E402
from triton_cpu import Executor  # noqa: E402

CONFIG, KEYS = MraAttentionConfig((16, 1), 0.3), MraKeysConfig(budget=0.3)


@pytest.fixture(autouse=True)
def executor():
    with Executor(ones=False) as running, launched_by(plainly):
        yield running
    torch._dynamo.reset()


def tokens(n=70, dtype=torch.float32, grad=False):
    return [x.requires_grad_(grad) for x in make_qkv(2, n=n, m=n, d=16, dv=16, dtype=dtype)]


def attend(query, key, value, mask=None, config=CONFIG, **extra):
    mask = AttentionMask.causal(query.shape[2], key.shape[2]) if mask is None else mask
    return mra_attention(query, key, value, config=config, mask=mask, impl="triton", **extra)


class Padded(torch.nn.Module):
    """Causal, with padding that comes as a tensor: of keys, and in self-attention of queries."""

    def __init__(self, config, of_queries=True):
        super().__init__()
        self.config, self.of_queries = config, of_queries

    def forward(self, query, key, value, valid):
        mask = AttentionMask.causal(query.shape[2], key.shape[2])
        mask = mask.with_padding(valid, valid if self.of_queries else None)
        return attend(query, key, value, mask, self.config).output


def padded(n, m, batch=2, dtype=torch.float32):
    valid = torch.ones(batch, m, dtype=torch.bool)
    valid[0, : m // 9], valid[-1, m - m // 7 :] = False, False
    return *make_qkv(2, batch, n=n, m=m, d=16, dv=16, dtype=dtype), valid


def test_registrations_agree():
    """Fake tensors and autograd, with what runs."""
    from mra_kernels._triton import autograd
    from mra_kernels._triton.mask_tables import mask_tables
    from mra_kernels._triton.plan import Settings
    from mra_kernels.scores import ScoreRule

    mask = AttentionMask.causal(40)
    for coarse in ("pooled", "none"):
        config = MraAttentionConfig((16, 1), 0.3, coarse=coarse)
        tables, budgets = mask_tables(mask, config)
        arguments = (
            *tokens(40, grad=True), None, [], budgets, list(tables[:4]), None, None,
            *Settings.of(config, ScoreRule(0.25), 0),
        )  # fmt: skip
        torch.library.opcheck(
            autograd.mra_forward,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("padding", [False, True])
def test_registrations_for_export_agree(padding):
    from mra_kernels._triton import exported

    query, key, _, valid = padded(40, 40)
    mask = AttentionMask.causal(40)
    told = mask.start, mask.stop, *([valid, valid] if padding else [None, None]), 40
    for operator, arguments in (
        (exported._mask_tables, (*told, 64, 16, 0.3, 2, "row")),
        (exported._mask_tables, (*told, 16, 16, 0.3, None, "head")),
        (exported._key_facts, (query, key, *told, 16, 24, [0.3] * 4, 0.25)),
    ):
        utilities = "test_schema", "test_faketensor"
        torch.library.opcheck(operator, arguments, test_utils=utilities)


def test_meta_tensors():
    meta = [x.to("meta") for x in tokens(dtype=torch.float16)]
    result = attend(*meta, AttentionMask.causal(70, device="meta"))
    assert result.output.device.type == "meta"
    assert result.output.shape == (2, 4, 70, 16) and result.output.dtype == torch.float16


@pytest.mark.parametrize("config", [CONFIG, KEYS])
def test_one_graph_for_all_lengths(config):
    from torch._dynamo.testing import CompileCounter

    counter, attention = CompileCounter(), Padded(config)
    graph = torch.compile(attention, backend=counter, fullgraph=True)
    for n in (70, 90, 128, 600):
        call = padded(n, n)
        for x in call:
            torch._dynamo.mark_dynamic(x, min(2, x.ndim - 1))
        assert torch.equal(graph(*call), attention(*call))
    assert counter.frame_count == 1


def test_compiled_gradients():
    graph = torch.compile(lambda *x: attend(*x).output, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (graph, lambda *x: attend(*x).output):
        leaves = tokens(grad=True)
        grads.append(torch.autograd.grad(call(*leaves).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("config", "strict"), [(CONFIG, True), (KEYS, False)])
def test_export_for_all_lengths(config, strict):
    """Of one block, too, and for other batches: bits as in the call."""
    attention, dtype = Padded(config, of_queries=False), torch.bfloat16 if strict else torch.float32
    batch, n, m = (torch.export.Dim(x) for x in "bnm")
    shapes = {0: batch, 2: n}, {0: batch, 2: m}, {0: batch, 2: m}, {0: batch, 1: m}
    program = torch.export.export(
        attention, padded(70, 90, dtype=dtype), dynamic_shapes=shapes, strict=strict
    )
    assert "_forward.default" in program.graph_module.code
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    graph = torch.export.load(file).module()
    for n, m, batch in ((70, 90, 2), (600, 130, 1), (5, 40, 3), (1, 1, 1)):
        call = padded(n, m, batch, dtype)
        assert torch.equal(graph(*call), attention(*call)), (n, m, batch)


def test_exported_gradients():
    """Of an export for self-attention of all lengths."""
    batch, n = torch.export.Dim("b"), torch.export.Dim("n")
    shapes = *[{0: batch, 2: n}] * 3, {0: batch, 1: n}
    program = torch.export.export(Padded(CONFIG), padded(70, 70), dynamic_shapes=shapes)
    grads = []
    for call in (program.module(), Padded(CONFIG)):
        *leaves, valid = padded(200, 200, 3)
        leaves = [x.requires_grad_() for x in leaves]
        grads.append(torch.autograd.grad(call(*leaves, valid).square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_exported_programs_find_their_operators():
    """In a process that never called one."""
    names = "mask_tables", "mra_forward", "mra_backward", "key_facts", "keys_forward"
    code = "import torch, mra_kernels.operators\n" + "\n".join(
        f"torch.ops.mra_kernels.{name}.default" for name in names
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_exported_lengths_have_the_limit_of_calls(monkeypatch):
    """Known when the graph runs."""
    graph = torch.export.export(Padded(CONFIG), padded(70, 70)).module()
    monkeypatch.setattr("mra_kernels._triton._MOST_ENTRIES", 4000)
    with pytest.raises(ValueError, match=r"^triton counts .*, got 70 x 70 entries; export with .*"):
        graph(*padded(70, 70))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_as_torch_does(compiled):
    """float32 becomes the half type, and gradients come back in float32; float64 stays."""
    call = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    leaves = tokens(grad=True)
    mixed = [leaves[0], leaves[1].detach().bfloat16(), leaves[2]]
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(*mixed).output
        assert ours.dtype == torch.bfloat16
        exact = scaled_dot_product_attention(*tokens(), enable_gqa=True)
        assert exact.dtype == torch.bfloat16
        wide = mra_attention(*make_qkv(0), config=CONFIG, impl="reference").output
        exact = scaled_dot_product_attention(*make_qkv(0), enable_gqa=True)
        assert wide.dtype == exact.dtype == torch.float64
    assert torch.equal(ours, attend(*(x.bfloat16() for x in leaves)).output)
    grads = torch.autograd.grad(ours.float().sum(), (leaves[0], leaves[2]))
    assert all(x.dtype == torch.float32 for x in grads)


def test_gradients_through_lse():
    """Alone, and together with those of the output."""
    leaves = tokens(grad=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours = attend(*leaves)
    exact = mra_attention(
        *wide,
        config=CONFIG,
        mask=AttentionMask.causal(70),
        impl="reference",
        selection=ours.selection,
    )
    for loss in (
        lambda x: x.lse.square().sum(),
        lambda x: x.lse.sin().sum() + x.output.square().sum(),
    ):
        grads = (
            torch.autograd.grad(loss(x), given, retain_graph=True, materialize_grads=True)
            for x, given in ((ours, leaves), (exact, wide))
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


def test_what_has_no_answer_is_refused_in_one_line():
    query, key, value = tokens(grad=True)
    (grad,) = torch.autograd.grad(attend(query, key, value).output.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no gradients of gradients; use impl='refer"):
        grad.sum().backward()


@pytest.mark.parametrize("config", [CONFIG, KEYS])
def test_transforms_are_refused_in_one_line(config):
    query, key, value = tokens()

    def loss(query):
        return mra_attention(query, key, value, config=config, impl="triton").output.sum()

    only = pytest.raises(ValueError, match=r"^triton has gradients by .* or use impl='reference'$")
    with only:
        torch.func.grad(loss)(query)
    with only:
        torch.func.jvp(loss, (query,), (query,))
    with only:
        torch.func.vmap(loss)(query[None])
    with torch.autograd.forward_ad.dual_level(), only:
        loss(torch.autograd.forward_ad.make_dual(query, query))


class NoLooking(TorchDispatchMode):
    """Nothing may depend on numbers in tensors: a GPU would be waited for, or not be captured."""

    NEEDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.NEEDS), f"{func} looks at numbers"
        return func(*args, **(kwargs or {}))


def test_nothing_looks_at_numbers(monkeypatch):
    """As a CUDA graph demands, also with a mask that is new, in which rows see nothing."""
    leaves = tokens(grad=True)
    expected = attend(*leaves, AttentionMask.causal(70, offset=-20)).output
    mask = AttentionMask.causal(70, offset=-20)
    # What a call knows of a capture.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
    with NoLooking():
        output = attend(*leaves, mask).output
        grads = torch.autograd.grad(output.sum(), leaves)
    monkeypatch.undo()
    assert torch.equal(output, expected)
    assert all(x.isfinite().all() for x in grads)
    assert not vars(mask).get("_kept"), "tables in a graph's memory outlive it"


def test_a_mask_that_served_inference_can_train():
    mask = AttentionMask.causal(70)
    with torch.inference_mode():
        attend(*tokens(), mask)
    leaves = tokens(grad=True)
    assert torch.autograd.grad(attend(*leaves, mask).output.sum(), leaves)[0].isfinite().all()
