"""The C++ path: the same plan gives the same numbers, and the same scores give the same plan."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_kernels import (
    PRESETS,
    AttentionMask,
    KeyPyramid,
    MraAttentionConfig,
    implementations,
    mra_attention,
)
from mra_kernels.testing import make_qkv
from operator_cases import cases

BLOCKS = [name for name, config in PRESETS.items() if isinstance(config, MraAttentionConfig)]

pytestmark = pytest.mark.skipif(
    implementations()["native"] is not None, reason=str(implementations()["native"])
)


def single(case):
    """A random call in float32."""
    *tokens, mask, config, extras = case
    tokens = [x.float() for x in tokens]
    return tokens, mask, config, {k: _float(v) for k, v in extras.items()}


def _float(value):
    return value.float() if isinstance(value, torch.Tensor) else value


def pairs_of(selection):
    groups = (selection.fine, *selection.coarse)
    return [torch.stack([p.head, p.row, p.col, p.legal], 1).tolist() for p in groups]


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_same_plan_gives_the_same_numbers(case):
    tokens, mask, config, extras = single(case)
    if mask.dense is not None:
        with pytest.raises(ValueError, match="intervals and padding"):
            mra_attention(*tokens, config=config, mask=mask, impl="native", **extras)
        return
    result = mra_attention(*tokens, config=config, mask=mask, impl="native", **extras)
    assert result.impl == "native" and result.output.dtype == torch.float32
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in extras.items()}
    expected = mra_attention(
        *(x.double() for x in tokens),
        config=config,
        mask=mask,
        impl="reference",
        selection=result.selection,
        **double,
    )
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(result.output.double(), expected.output, **close)
    torch.testing.assert_close(result.lse.double(), expected.lse, **close)
    chosen = result.selection
    assert (chosen.density <= config.budget + chosen.forced + 1e-12).all()


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(1, 5))
def test_the_same_scores_give_the_same_plan(case, rows, cols):
    """Small integers in whole blocks whose side is a power of two: sums are exact in any order."""
    (query, key, value), mask, config, extras = single(case)
    if 12 in config.resolutions:
        config = dataclasses.replace(config, resolutions=(16, 8, 2, 1))
    side = config.resolutions[0]
    if config.query_rows == 3 * side:
        config = dataclasses.replace(config, query_rows=4 * side)
        rows = max(1, rows & ~2)  # no mean of three times a side
    generator = torch.Generator().manual_seed(rows)
    query = torch.randint(-3, 4, (*query.shape[:2], rows * side, 6), generator=generator).float()
    key = torch.randint(-3, 4, (*key.shape[:2], cols * side, 6), generator=generator).float()
    value = torch.randn(*key.shape[:3], 5, generator=generator)
    if mask.is_causal:
        window = None if mask.window is None else max(1, mask.window)
        mask = AttentionMask.causal(rows * side, cols * side, window=window)
    else:
        mask = AttentionMask.full(rows * side, cols * side)
    sinks = {"sinks": extras["sinks"], "scaling": 0.5}
    arguments = {"config": config, "mask": mask, **sinks}
    ours = mra_attention(query, key, value, impl="native", **arguments)
    theirs = mra_attention(query, key, value, impl="reference", **arguments)
    assert pairs_of(ours.selection) == pairs_of(theirs.selection)
    assert ours.selection.dot_products == theirs.selection.dot_products
    assert torch.equal(ours.selection.density, theirs.selection.density)
    assert torch.equal(ours.selection.forced, theirs.selection.forced)
    torch.testing.assert_close(ours.output, theirs.output, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("causal", [False, True])
def test_plans_agree_where_scores_do_not_tie(name, causal):
    """Normal inputs, padding, ragged lengths: no two scores are so close as to change places."""
    query, key, value = make_qkv(5, n=300, m=300, d=24, dtype=torch.float32)
    mask = AttentionMask.causal(300) if causal else AttentionMask.full(300, 300)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[0, :70] = False
    mask = mask.with_padding(valid, valid)
    arguments = {"config": PRESETS[name], "mask": mask}
    ours = mra_attention(query, key, value, impl="native", **arguments)
    theirs = mra_attention(query, key, value, impl="reference", **arguments)
    assert pairs_of(ours.selection) == pairs_of(theirs.selection)
    assert ours.selection.dot_products == theirs.selection.dot_products
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 16, 17, 80, 256])
def test_any_width(width):
    query, key, value = make_qkv(1, n=100, m=90, d=width, dv=width + 3, dtype=torch.float32)
    for config in PRESETS.values():
        ours = mra_attention(query, key, value, config=config, impl="native")
        theirs = mra_attention(
            query, key, value, config=config, impl="reference", selection=ours.selection
        )
        torch.testing.assert_close(ours.output, theirs.output, rtol=2e-5, atol=2e-5)


def test_strided_inputs_need_no_copy_and_are_left_alone():
    packed = torch.randn(2, 200, 3, 4, 16)
    before = packed.clone()
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    for config in PRESETS.values():
        ours = mra_attention(query, key, value, config=config, impl="native").output
        contiguous = [x.contiguous() for x in (query, key, value)]
        assert torch.equal(ours, mra_attention(*contiguous, config=config, impl="native").output)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("name", PRESETS)
def test_threads_change_nothing(name):
    query, key, value = make_qkv(2, heads=3, kv_heads=1, n=500, m=500, d=16, dtype=torch.float32)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(mra_attention(query, key, value, config=PRESETS[name]).output)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    tokens = [x.to(dtype) for x in make_qkv(4, n=128, m=128, d=16)]
    config = PRESETS["mra"]
    result = mra_attention(*tokens, config=config)
    single = mra_attention(*(x.float() for x in tokens), config=config)
    assert result.impl == "native" and result.output.dtype == dtype
    assert torch.equal(result.output, single.output.to(dtype))


def test_auto_says_what_ran():
    query, key, value = make_qkv(0, dtype=torch.float32)
    config = PRESETS["mra2"]
    assert mra_attention(query, key, value, config=config).impl == "native"
    double = mra_attention(query.double(), key.double(), value.double(), config=config)
    assert double.impl == "reference"
    query.requires_grad_()
    assert mra_attention(query, key, value, config=config).impl == "reference"
    with torch.no_grad():
        assert mra_attention(query, key, value, config=config).impl == "native"
    with pytest.raises(ValueError, match=r"no gradients.*impl='reference'"):
        mra_attention(query, key, value, config=config, impl="native")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("resolutions", [(8, 1), (16, 4, 1)])
def test_rows_of_more_than_64_blocks(resolutions, causal):
    generator = torch.Generator().manual_seed(7)
    query, key = (
        torch.randint(-3, 4, (1, 2, 1200, 4), generator=generator).float() for _ in range(2)
    )
    mask = AttentionMask.causal(1200) if causal else AttentionMask.full(1200, 1200)
    config = MraAttentionConfig(resolutions=resolutions, budget=0.1, first_blocks=1)
    arguments = {"config": config, "mask": mask, "scaling": 0.5}
    ours = mra_attention(query, key, key, impl="native", **arguments).selection
    theirs = mra_attention(query, key, key, impl="reference", **arguments).selection
    assert pairs_of(ours) == pairs_of(theirs)
    assert ours.dot_products == theirs.dot_products


def test_long_rows_of_blocks_and_many_heads():
    """More than 64 blocks a row, several groups of heads in flight, every level."""
    query, key, value = make_qkv(
        6, batch=3, heads=6, kv_heads=2, n=1500, m=1500, d=8, dtype=torch.float32
    )
    config = MraAttentionConfig(resolutions=(16, 4, 1), budget=0.1, coarse="per_query")
    mask = AttentionMask.causal(1500, window=700)
    ours = mra_attention(query, key, value, config=config, mask=mask, impl="native")
    theirs = mra_attention(
        query, key, value, config=config, mask=mask, impl="reference", selection=ours.selection
    )
    torch.testing.assert_close(ours.output, theirs.output, rtol=2e-5, atol=2e-5)
    assert float((ours.selection.density - 0.1).abs().max()) < 0.01


PROBE = """
import torch
from mra_kernels import PRESETS, implementations, mra_attention
print(implementations()["native"])
print(mra_attention(*torch.randn(3, 1, 2, 64, 8), config=PRESETS["mra2"]).impl)
"""


@pytest.mark.parametrize(
    ("change", "reason", "impl"),
    [
        ({"CXX": "no-such-compiler"}, "needs a C++ compiler", "reference"),
        ({"CXX": "false"}, "to compile it with OpenMP, which failed", "reference"),
        ({"XDG_CACHE_HOME": "/proc/no/such"}, "None", "native"),
    ],
)
def test_a_machine_that_cannot_compile_says_so_and_works(tmp_path, change, reason, impl):
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **change},
        capture_output=True,
        text=True,
        check=True,
    )
    assert reason in run.stdout.splitlines()[0]
    assert run.stdout.splitlines()[1] == impl


@pytest.mark.parametrize("name", BLOCKS)
def test_a_kept_pyramid_changes_nothing(name):
    """Token by token and in chunks, with left padding."""
    _, key, value = make_qkv(3, kv_heads=2, n=1, m=300, d=16, dv=12, dtype=torch.float32)
    queries = torch.randn(2, 4, 300, 16)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :50] = False
    config = PRESETS[name]
    pyramid, length = KeyPyramid(config.resolutions[:-1]), 0
    for step in (130, 1, 1, 29, 3, 65, 1, 70):
        length += step
        mask = AttentionMask.causal(step, length).with_padding(valid[:, :length])
        keys, values = key[:, :, :length], value[:, :, :length]
        pyramid.extend(keys, values, valid[:, :length])
        query = queries[:, :, length - step : length]
        arguments = {"config": config, "mask": mask, "impl": "native"}
        kept = mra_attention(query, keys, values, pyramid=pyramid, **arguments)
        assert torch.equal(kept.output, mra_attention(query, keys, values, **arguments).output)
    assert pyramid.length == 300


def test_a_late_row_is_no_first_row():
    """One query at the end of a cache: 'first row first' must not favour all its blocks."""
    query, key, value = make_qkv(3, n=1, m=320, d=16, dtype=torch.float32)
    config = MraAttentionConfig(budget=0.2, first_blocks=1, diagonal_blocks=1)
    fine = mra_attention(query, key, value, config=config, mask=AttentionMask.causal(1, 320))
    chosen = fine.selection.fine
    for head in range(8):
        cols = chosen.col[chosen.head == head].tolist()
        assert len(cols) == 2 and 0 in cols and 9 in cols, "the first and its own"


def test_a_pyramid_of_other_blocks_is_refused():
    query, key, value = make_qkv(0, dtype=torch.float32)
    pyramid = KeyPyramid((16, 4))
    with pytest.raises(ValueError, match=r"must have blocks of \(32,\).*got \(16, 4\)"):
        mra_attention(query, key, value, config=PRESETS["mra2"], pyramid=pyramid)


def _library(name):
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
@pytest.mark.parametrize(
    "flags",
    ["-march=x86-64-v2", "-march=x86-64-v3", "-fsanitize=address,undefined -g -O1"],
    ids=["sse", "avx2", "sanitizers"],
)
def test_other_processors_and_every_access(flags, tmp_path):
    """The tests of the C++ path, with narrower vectors, and with every memory access checked."""
    files = __file__, str(Path(__file__).with_name("test_keys.py"))
    change = {"CXX": "g++", "CXXFLAGS": flags, "XDG_CACHE_HOME": str(tmp_path)}
    if "sanitize" in flags:
        change["LD_PRELOAD"] = f"{_library('libasan.so')} {_library('libubsan.so')}"
        change["ASAN_OPTIONS"] = "detect_leaks=0"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not machine", "-m", "not slow", *files],
        env={**os.environ, **change},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((tmp_path / "mra-cli").glob("*.so")), "compiled with these flags"
