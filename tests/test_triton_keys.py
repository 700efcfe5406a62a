"""The kernels for single keys: their own IR, run on the CPU, against the specification."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from mra_kernels import AttentionMask, MraKeysConfig, exact_attention, mra_attention  # noqa: E402
from mra_kernels._triton import (  # noqa: E402
    keys,
    keys_attention,
    keys_choice,
    keys_estimate,
)
from mra_kernels._triton.keys_tables import _features, key_facts  # noqa: E402
from mra_kernels.features import iterated_vectors, leading_vectors  # noqa: E402
from mra_kernels.scores import ScoreRule  # noqa: E402
from mra_kernels.testing import make_qkv  # noqa: E402
from test_triton_faults import Fault, planted  # noqa: E402
from triton_cases import launched_by, plainly  # noqa: E402
from triton_cpu import Executor, OutOfBounds  # noqa: E402
from triton_keys_cases import BY_NAME, SETTINGS, check, drawn  # noqa: E402
from triton_static.keys_model import FEATURE_BYTES, FEATURE_OPS  # noqa: E402

CASES = int(os.environ.get("MRA_KERNEL_CASES", "40")) // 2
"""Random calls per setting."""


@pytest.fixture
def executor():
    with Executor(ones=False) as running, launched_by(plainly):
        yield running


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_random_calls(setting):
    for number in range(CASES):
        check(drawn(setting, number))


ODD, MRA = "odd widths", "mra"
WIDTHS = BY_NAME[ODD].widths
FAULTS = [
    Fault("ties go to the higher index", keys_choice._last_turns, "tl.cumsum(at_limit, 0)",
          "tl.cumsum(at_limit, 0, reverse=True)", ODD),
    Fault("one key too many", keys_choice._last_turns, "turn <= quota", "turn <= 1 + quota", ODD),
    Fault("blocks don't wait for those before", keys_choice.limit_kernel, "+ cost, 0)", ", 0)",
          ODD),
    Fault("padding spends the budget", keys_choice._prices, "== segment", "<= 1", MRA),
    Fault("the edge of the mask", keys_choice._open_run, "(row[:, None] < stop",
          "(row[:, None] <= stop", ODD),
    Fault("sampled keys count once", keys_estimate.estimate_kernel, "_LOG2_APART, own", "0.0, own",
          ODD),
    Fault("padding is real", keys_estimate.are_real, "mask=real, other=0) != 0",
          "mask=real, other=0) >= 0", MRA),
    Fault("no tilt", keys_attention.attend_kernel, "other += tilt", "other += 0 * tilt", ODD),
    Fault("opened keys in the tail", keys_attention.tail_kernel, "[RB, BN]) == 0", "[RB, BN]) >= 0",
          ODD),
    Fault("keys that wait are lost", keys_attention._add_to_list, "LIST + filled + tl.cumsum",
          "LIST + tl.cumsum", ODD),
    Fault("mask edge of the attention", keys_attention._list_step, "< stop[:, None]",
          "<= stop[:, None]", ODD),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_found(fault):
    with planted(fault), pytest.raises((AssertionError, OutOfBounds)):
        for number in range(12):
            check(drawn(BY_NAME[fault.setting], number))


def test_a_key_that_all_price_alike_goes_by_its_index():
    """Nothing but ties, over blocks, chunks and steps of a kernel."""
    query, key, value = make_qkv(0, 1, 1, 1, 300, 900, *WIDTHS, dtype=torch.float32)
    config = MraKeysConfig(budget=0.3, rank=33, first_keys=0)
    query, key = torch.ones_like(query), torch.ones_like(key)
    with Executor(ones=False), launched_by(plainly):
        ours = mra_attention(query, key, value, config=config, impl="triton").selection
    theirs = mra_attention(query, key, value, config=config, impl="reference").selection
    assert torch.equal(ours.opened(), theirs.opened())
    assert ours.counts == theirs.counts


def test_a_budget_of_one_is_exact_attention():
    tokens = make_qkv(1, 1, 1, 1, 200, 200, *WIDTHS, dtype=torch.float32)
    mask, config = AttentionMask.causal(200), MraKeysConfig(budget=1.0, rank=33)
    with Executor(ones=False), launched_by(plainly):
        result = mra_attention(*tokens, config=config, mask=mask, scaling=0.25, impl="triton")
    exact = exact_attention(*tokens, mask=mask, scaling=0.25)
    torch.testing.assert_close(result.output, exact, rtol=1e-5, atol=1e-5)
    assert (result.selection.density == 1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_six_launches_that_load_what_they_need_once(executor, causal):
    """Opened keys and values once per block that opened them; nothing of N x M but bits."""
    n, width = 2048, 64
    tokens = make_qkv(0, 1, 2, 1, n, n, width, width, torch.bfloat16)
    mask = AttentionMask.causal(n) if causal else AttentionMask.full(n, n)
    every = torch.ones(1, n, dtype=torch.bool)
    result = mra_attention(
        *tokens, config=MraKeysConfig(budget=0.1), mask=mask.with_padding(every, every),
        sinks=torch.zeros(2), impl="triton",
    )  # fmt: skip
    names = ["pool", "estimate", "limit", "open", "tail", "attend"]
    assert [x.name.removesuffix("_kernel") for x in executor.launches] == names
    _, estimate, _, opener, tail, attend = executor.launches
    opened = int(result.selection.opened().sum())
    row = width * tokens[0].element_size()
    assert attend.loaded_bytes["K"] == attend.loaded_bytes["V"] == opened * row
    assert attend.loaded_bytes["Q"] == attend.stored_bytes["OUTPUT"] == 2 * n * row
    assert opener.stored_bytes["OPEN"] == 2 * (n // 16) * n // 8
    tiles = 2 * n // tail.values["RB"] // 16
    assert tail.loaded_bytes["K"] <= tiles * n * row
    features = 2 * n * estimate.values["RP"]
    assert estimate.loaded_bytes["Q"] == opener.loaded_bytes["Q"] == features
    # A tile where the money runs out within a distance goes over its keys twice.
    assert opener.loaded_bytes["K"] <= (n // 64 + 1) * features


def test_one_operator_for_torch(executor):
    """Fake and meta tensors and compiled graphs agree with what runs."""
    mask, config = AttentionMask.causal(40), MraKeysConfig(budget=0.3, rank=33)
    query, key, value = make_qkv(2, 2, 2, 2, 40, 40, *WIDTHS, dtype=torch.float32)
    features, tables, budgets = key_facts(query, key, mask, config, 0.25)
    torch.library.opcheck(
        keys.keys_forward,
        (query, key, value, None, features, budgets, list(tables[:3]), None, None, 16, 16, True,
         ScoreRule(0.25).scaling, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

    def attend(query, key, value, mask=None):
        return mra_attention(query, key, value, config=config, mask=mask, impl="triton").output

    meta = [x.to("meta") for x in (query, key, value)]
    shape = attend(*meta, AttentionMask.causal(40, device="meta"))
    assert shape.device.type == "meta" and shape.shape == (2, 2, 40, 24)
    graph = torch.compile(attend, backend="eager", fullgraph=True)
    mask = AttentionMask.causal(40)
    plain = attend(query, key, value, mask)
    half = attend(*(x.bfloat16() for x in (query, key, value)), mask)
    assert torch.equal(graph(query, key, value, mask), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(query, key, value, mask), half)


class Counted(TorchDispatchMode):
    """Operations that compute, and the bytes they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "view" not in function.__name__:
            tensors = [x for x in tree_leaves((args, result)) if torch.is_tensor(x)]
            sizes = [(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors]
            self.operations += 1
            self.bytes += sum(min(size) for size in sizes)
        return result


@pytest.mark.parametrize("width", FEATURE_BYTES)
def test_predictions_count_what_features_cost(width):
    n, heads = 16384, 2
    query, key = torch.empty(2, 1, heads, n, width, dtype=torch.bfloat16, device="meta")
    mask = AttentionMask.full(n, n, device="meta")
    with Counted() as counted:
        _features(query, key, mask, MraKeysConfig(), 0.125)
    assert counted.operations == FEATURE_OPS
    assert counted.bytes / n / heads == pytest.approx(FEATURE_BYTES[width], rel=0.02)


def test_features_of_gpus_explain_nearly_as_much():
    """What they leave out of scores, in the mean square: at most 2 % more than eigenvectors do."""
    generator = torch.Generator().manual_seed(0)
    for width, decay in ((64, 0.1), (128, 0.02), (64, 1e-4)):
        mixed = torch.linalg.qr(torch.randn(4, width, width, generator=generator))[0]
        sizes = torch.logspace(0, torch.tensor(decay).log10(), width)
        matrix = mixed @ (sizes[:, None] * mixed.mT)
        total = sizes.sum()
        left = [
            float((total - (v.mT @ matrix @ v).diagonal(dim1=-2, dim2=-1).sum(-1)).max() / total)
            for v in (leading_vectors(matrix, 24), iterated_vectors(matrix, 24))
        ]
        assert left[1] <= 1.02 * left[0] + 1e-3, (width, decay, left)


def test_gradients_are_left_to_the_specification(executor):
    tokens = make_qkv(2, 2, 2, 2, 40, 40, *WIDTHS, dtype=torch.float32)
    tokens, config = [x.requires_grad_() for x in tokens], MraKeysConfig(rank=33)
    with pytest.raises(ValueError, match=r"no backward pass for single keys.*impl='reference'$"):
        mra_attention(*tokens, config=config, impl="triton")
    with torch.no_grad():
        assert mra_attention(*tokens, config=config, impl="triton").impl == "triton"


def test_no_row_but_its_own_block_speaks():
    """A block of rows that see nothing, and a key nobody sees: closed, and no NaN."""
    start = torch.zeros(1, 48, dtype=torch.int64)
    stop = start + 40
    stop[:, 16:32] = 0
    mask = AttentionMask(start, stop, 48)
    tokens = make_qkv(2, 1, 1, 1, 48, 48, *WIDTHS, dtype=torch.float32)
    config = MraKeysConfig(budget=0.2, rank=33)
    with Executor(ones=False), launched_by(plainly):
        result = mra_attention(*tokens, config=config, mask=mask, impl="triton")
    assert not result.output.isnan().any() and not result.selection.opened()[:, :, 1].any()
    assert (result.lse[:, :, 16:32] == -torch.inf).all()
    assert not result.selection.opened()[..., 40:].any()
    mean = tokens[2].mean(2, keepdim=True).expand(-1, -1, 16, -1)
    torch.testing.assert_close(result.output[:, :, 16:32], mean)
