"""What the Triton path takes and refuses, and what it makes of masks; nothing is compiled here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_kernels import (
    PRESETS,
    AttentionMask,
    MraAttentionConfig,
    MraKeysConfig,
    implementations,
    mra_attention,
    reason_against,
)
from mra_kernels._triton import WIDEST
from mra_kernels._triton.mask_tables import tables_of
from mra_kernels.testing import make_qkv

CONFIG = MraAttentionConfig()


@pytest.fixture
def anywhere(monkeypatch):
    """As if CPU tensors were on a GPU."""
    monkeypatch.setattr("mra_kernels._triton.runs_on_cpu", lambda: True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": MraKeysConfig(rows=20)}, r"blocks of 16, 32 or 64 queries, got 20"),
        ({"config": PRESETS["mra3"]}, r"two resolutions like \(32, 1\), got \(16, 4, 1\)"),
        ({"config": MraAttentionConfig(resolutions=(8, 1))}, r"blocks of 16, 32 or 64, got 8"),
        ({"config": MraAttentionConfig(query_rows=96)}, r"powers of two up to 1024 .*, got 96"),
        ({"dtype": torch.float64}, r"float16, bfloat16 and float32, got torch.float64"),
        ({"bias": torch.zeros(1, 4, 50, 50)}, r"no kernel for a bias"),
        ({"d": WIDEST + 1}, rf"heads up to {WIDEST} wide, got {WIDEST + 1}"),
        ({"mask": AttentionMask.from_dense(torch.rand(1, 50, 50) < 0.5)}, r"not any matrix"),
    ],
)
def test_what_it_cannot_take_is_refused_in_one_line(anywhere, change, says):
    dtype, width = change.pop("dtype", torch.float32), change.pop("d", 16)
    tokens = make_qkv(0, d=width, dtype=dtype)
    with pytest.raises(ValueError, match=says + r".*impl='reference'$") as error:
        mra_attention(*tokens, impl="triton", **{"config": CONFIG, **change})
    assert "\n" not in str(error.value)


def test_a_plan_of_another_call_is_refused(anywhere):
    tokens = make_qkv(0, dtype=torch.float32)
    plan = mra_attention(*tokens, config=CONFIG, impl="reference").selection
    with pytest.raises(ValueError, match=r"chooses its own blocks; leave selection out"):
        mra_attention(*tokens, config=CONFIG, impl="triton", selection=plan)


def test_more_pairs_than_it_can_count():
    n = 300_000
    mask = AttentionMask.full(n, n)
    assert "counts" in str(_reason(mask=mask, config=CONFIG))
    short = AttentionMask.full(n // 3, n // 3)
    assert "counts" not in str(_reason(mask=short, config=CONFIG))


def _reason(**call):
    meta = torch.empty(1, 1, 1, 64, device="meta")
    return reason_against("triton", meta, **call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_auto_goes_without():
    assert "needs a GPU" in implementations()["triton"]
    tokens = make_qkv(0, dtype=torch.float32)
    assert mra_attention(*tokens, config=CONFIG).impl != "triton"
    with pytest.raises(ValueError, match=r"runs on GPUs only; or use impl='reference'"):
        mra_attention(*tokens, config=CONFIG, impl="triton")


def test_importing_the_package_does_not_import_triton():
    code = "import sys, mra_kernels; print(implementations := mra_kernels.implementations());"
    code += "assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@st.composite
def masks(draw):
    n, m = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    kind = draw(st.sampled_from(["full", "causal", "offset", "window", "chunk"]))
    extra = {
        "offset": {"offset": draw(st.integers(0, 40))},
        "window": {"window": draw(st.integers(1, 60))},
        "chunk": {"chunk": draw(st.integers(1, 60))},
    }.get(kind, {})
    mask = AttentionMask.full(n, m) if kind == "full" else AttentionMask.causal(n, m, **extra)
    if draw(st.booleans()):
        bits = st.lists(st.booleans(), min_size=m, max_size=m)
        valid = torch.tensor([draw(bits), draw(bits)])
        mask = mask.with_padding(valid, valid if n == m else None)
    return mask


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([16, 32]), st.booleans())
def test_tables_say_what_the_mask_says(mask, side, by_count):
    """Runs of whole and seen blocks against counting each pair's entries."""
    tables, costs = tables_of(mask, side, side)
    batch = tables.rows.shape[0]
    n_queries, n_keys = mask.block_sizes(side, batch)
    rows, cols = n_queries.shape[1], n_keys.shape[1]
    index = torch.arange(batch * rows * cols)
    b, row, col = index // (rows * cols), index // cols % rows, index % cols
    legal = mask.tile_counts(b, row, col, side).view(batch, rows, cols)
    whole = (legal > 0) & (legal == n_queries[:, :, None] * n_keys[:, None])
    place = torch.arange(cols)
    first, stop, seen, unseen = (tables.rows[..., i, None] for i in range(4))
    real = (tables.keys_per_block > 0)[:, None]
    assert torch.equal((place >= first) & (place < stop) & real, whole)
    assert torch.equal((place >= seen) & (place < unseen) & real, legal > 0)
    assert torch.equal(tables.keys_per_block.long(), n_keys)
    assert torch.equal(tables.rows[..., 4].long(), n_queries)
    cut = (legal > 0) & ~whole
    assert torch.equal(costs.entries, legal.sum(2))
    assert torch.equal(costs.cut_entries, (legal * cut).sum(2))
    assert torch.equal(costs.cut_blocks, cut.sum(2))
    config = MraAttentionConfig((side, 1), 0.3, blocks_per_row=2 if by_count else None, scope="row")
    spent = costs.cut_blocks if by_count else costs.cut_entries
    worth = 2 * (costs.entries > 0) if by_count else (0.3 * costs.entries.double() + 1e-6).long()
    assert torch.equal(costs.budgets(config), worth - spent)
