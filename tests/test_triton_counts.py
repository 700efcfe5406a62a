"""What a pass costs in launches and bytes, counted while the kernels' IR runs on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
pytest.importorskip("triton")

from mra_kernels import AttentionMask, MraAttentionConfig, mra_attention  # noqa: E402
from mra_kernels.testing import make_qkv  # noqa: E402
from triton_cases import launched_by, plainly  # noqa: E402
from triton_cpu import Executor  # noqa: E402
from triton_static.cases import Case, launches  # noqa: E402
from triton_static.model import GPUS, Call, forward  # noqa: E402
from triton_static.predict import SWEEPS, kernels_of  # noqa: E402

N, SIDE = 4096, 32
BACKWARD = {"pooled": 5, "per_query": 4, "none": 3}
"""Launches of a backward pass: deltas, queries, keys; the coarse term's columns, and its rows,
unless they are queries."""


def run(coarse, budget=0.1, causal=False):
    """A pass both ways, what it launched, and its tensors."""
    query, key, value = (
        x.to(torch.bfloat16).requires_grad_()
        for x in make_qkv(0, 1, 2, 1, N, N, 64, 64, torch.float32)
    )
    config = MraAttentionConfig(resolutions=(SIDE, 1), budget=budget, coarse=coarse)
    mask = AttentionMask.causal(N) if causal else AttentionMask.full(N, N)
    with Executor(ones=False, distinct=True) as executor, launched_by(plainly):
        result = mra_attention(query, key, value, config=config, mask=mask, impl="triton")
        forward = list(executor.launches)
        result.output.backward(torch.ones_like(result.output))
    return result, forward, executor.launches[len(forward) :], (query, key, value)


def bytes_of(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def tiles_and_blocks(pairs, tile, of_queries=True):
    """Pairs of a tile of so many queries and a key block, any of whose pairs is among these; or of
    a tile of keys and a row of blocks."""
    ours, other = (pairs.row, pairs.col) if of_queries else (pairs.col, pairs.row)
    return len(torch.stack([pairs.head, ours * SIDE // tile, other], 1).unique(dim=0))


def selected_bytes(result, value, tile_rows):
    """Keys and values of the blocks that any row of a tile opened, once per tile."""
    blocks = tiles_and_blocks(result.selection.fine, tile_rows)
    return blocks * SIDE * 2 * value.shape[-1] * value.element_size()


def means_bytes(result, value, tile_rows):
    """Means of keys and values, once per tile that sees them: what `per_query` adds."""
    return tiles_and_blocks(result.selection.coarse[0], tile_rows) * 2 * value.shape[-1] * 4


@pytest.mark.parametrize("coarse", BACKWARD)
def test_launches(coarse):
    _, forward, backward, _ = run(coarse)
    assert len(forward) <= 4
    assert len(backward) == BACKWARD[coarse]


@pytest.mark.parametrize("query_rows", [None, 128])
@pytest.mark.parametrize("n", [512, 1024, 2048, 4096])
def test_predictions_launch_what_is_launched(n, query_rows):
    """Short sequences are chosen and opened in one launch."""
    call = Call(n, 64, 0.1, side=SIDE, query_rows=query_rows)
    predicted = forward(GPUS["H100"], call, kernels_of("H100", 64), SWEEPS)
    assert predicted.launches == len(launches(Case("", n=n, query_rows=query_rows), "sm_90"))
    assert predicted.launches == (3 if n * n // (query_rows or SIDE) <= 1024 * SIDE else 4)


def test_queries_that_share_a_list_read_it_once():
    query, key, value = (
        x.to(torch.bfloat16) for x in make_qkv(0, 1, 2, 1, 2048, 2048, 128, 128, torch.float32)
    )
    config = MraAttentionConfig(resolutions=(SIDE, 1), budget=0.1, query_rows=128)
    with Executor(ones=False, distinct=True) as executor, launched_by(plainly):
        result = mra_attention(query, key, value, config=config, impl="triton")
    attend = executor.launches[-1]
    fine, of_block = result.selection.fine, 2 * SIDE * 128 * 2
    lists = torch.stack([fine.head, fine.row], 1).unique(dim=0, return_counts=True)[1]
    least, most = lists.sum() * of_block, (lists + lists % 2).sum() * of_block
    assert attend.values["BM"] == 128
    # Two blocks a step: lists of odd length end in one that is masked off.
    assert least <= attend.loaded_bytes["K"] + attend.loaded_bytes["V"] <= most


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.25])
@pytest.mark.parametrize("coarse", BACKWARD)
def test_a_forward_pass_moves_little_more_than_it_must(coarse, budget, causal):
    """Each input once, each output once, and what a tile of queries selected once per tile."""
    result, forward, _, tokens = run(coarse, budget, causal)
    attend = forward[-1]
    selected = selected_bytes(result, tokens[2], attend.values["BM"])
    least = bytes_of(*tokens, result.output, result.lse) + selected
    if coarse == "per_query":
        least += means_bytes(result, tokens[2], attend.values["BM"])
    moved = sum(sum(x.values()) for one in forward for x in (one.loaded_bytes, one.stored_bytes))
    assert moved <= 1.3 * least, f"{moved / least:.2f} times the least"
    # Lists of odd length end in a block that is masked off, but for its first keys.
    assert selected <= attend.loaded_bytes["K"] + attend.loaded_bytes["V"] <= 1.05 * selected
    assert attend.loaded_bytes["Q"] == bytes_of(tokens[0])
    assert attend.stored_bytes["OUTPUT"] == bytes_of(result.output)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("budget", [0.1, 0.25])
@pytest.mark.parametrize("coarse", BACKWARD)
def test_a_backward_pass_moves_little_more_than_it_must(coarse, budget, causal):
    """Each input, the output and its gradient, lse and deltas once; each gradient once; what a tile
    of queries selected once per tile, and once per tile of keys the queries that selected it, with
    the gradients of their output. ``per_query`` adds means per tile of queries, and queries with
    those gradients per tile of means."""
    result, _, backward, tokens = run(coarse, budget, causal)
    of_queries, of_keys = backward[-2:]
    rows, cols = of_queries.values["BM"], of_keys.values["BN"]
    least = bytes_of(*tokens, result.output, result.output, result.lse, result.lse, *tokens)
    fine, of_tokens = result.selection.fine, 2 * tokens[0].shape[-1] * tokens[0].element_size()
    least += SIDE * of_tokens * (tiles_and_blocks(fine, rows) + tiles_and_blocks(fine, cols, False))
    if coarse == "per_query":
        left, wide = result.selection.coarse[0], SIDE * backward[-3].values["CB"]
        least += means_bytes(result, tokens[2], rows)
        least += SIDE * of_tokens * tiles_and_blocks(left, wide, False)
    moved = sum(sum(x.values()) for one in backward for x in (one.loaded_bytes, one.stored_bytes))
    assert moved <= 1.3 * least, f"{moved / least:.2f} times the least"
    stored = {name: n for launch in backward for name, n in launch.stored_bytes.items()}
    for name, tensor in zip(("DQ", "DK", "DV_"), tokens, strict=True):
        assert stored[name] == bytes_of(tensor), name
        assert not tensor.grad.isnan().any()


def test_predictions_score_blocks_as_often_as_the_kernels():
    _, (_, threshold, opener, _), _, _ = run("pooled")
    for launch, sweeps in [(threshold, SWEEPS["threshold"] + SWEEPS["alone"]), (opener, 1)]:
        values = launch.values
        tiles = N // SIDE // values["RB"] * 2
        assert launch.loaded_bytes["K_MEANS"] == sweeps * tiles * (N // SIDE) * values["D"] * 4
    assert SWEEPS["open"] == 1
