"""Faults planted in the kernels, one at a time: the random calls must find each."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
triton = pytest.importorskip("triton")

from mra_kernels._triton import (  # noqa: E402
    backward_coarse,
    backward_key,
    backward_query,
    forward,
    lists,
    pairs,
    pooling,
    primitives,
    search,
    selection,
    short,
    threshold,
)
from triton_cases import BY_NAME, on_random_calls  # noqa: E402
from triton_cpu import OutOfBounds  # noqa: E402
from triton_oracle import check, check_gradients  # noqa: E402

CALLS = range(60)
"""Those of test_triton_random.py, where they pass."""


@dataclass(frozen=True)
class Fault:
    """``old`` in the kernel's source becomes ``new``; the setting that must notice."""

    name: str
    kernel: object
    old: str
    new: str
    setting: str = "mra2"
    examine: object = check


FAULTS = [
    Fault("mask edge", lists.visible_keys, "< stop[:, None]", "<= stop[:, None]"),
    Fault("mask start", lists.visible_keys, ">= begin[:, None]", "> begin[:, None]"),
    Fault("padding is seen", lists.visible_keys, "& real[None, :]", "", "mra2 padded"),
    Fault("missing rescale", primitives.softmax_step_whole, "mass * decay +", "mass +"),
    Fault(
        "missing rescale of values",
        primitives.softmax_step,
        "weighted * decay[:, None]",
        "weighted",
    ),
    Fault(
        "stale index",
        forward.forward_kernel,
        "entries_of(LISTS, at + STEP, n_listed",
        "entries_of(LISTS, at, n_listed",
    ),
    Fault("diagonal is whole", lists.list_keys, "(col < whole_stop)", "(col <= whole_stop)"),
    Fault(
        "another row's blocks",
        lists.list_keys,
        "first_row + each",
        "first_row + 1 - each",
    ),
    Fault(
        "wrong group of heads",
        forward.forward_kernel,
        "(head // GROUP).to(tl.int64) * svh",
        "(head % (heads // GROUP)).to(tl.int64) * svh",
        "mra2 padded",
    ),
    Fault(
        "mean of too many",
        pooling._pool_block,
        "counted.to(tl.float32)",
        "(token >= 0).to(tl.float32)",
    ),
    Fault(
        "one pair too few",
        threshold._narrowed,
        "cost_from > left",
        "cost_from >= left",
        "block per row",
    ),
    Fault(
        "one pair too few, in one launch",
        search.lowest_paid,
        "above > left",
        "above >= left",
        "shared by half a tile",
    ),
    Fault("size of a block", pairs.coarse_step, "+ size[None, :]", ""),
    Fault(
        "diagonal of a square block",
        pairs.sort_keys,
        "QUERY_ROWS // SIDE + DIAGONAL",
        "1 + DIAGONAL",
        "shared lists",
    ),
    Fault(
        "coarse term of another tile",
        forward.forward_kernel,
        "tl.minimum(first_row + each, rows - 1)",
        "each",
        "shared lists",
    ),
    Fault(
        "another part of a block",
        lists.list_queries,
        "(part * PART // QUERY_ROWS)",
        "part",
        "shared lists",
        check_gradients,
    ),
    Fault(
        "beyond the last key",
        lists.load_tokens,
        "inside = tokens_of(entry, SIDE, BN) < n",
        "inside = tokens_of(entry, SIDE, BN) >= 0",
    ),
    Fault(
        "lse in base 2",
        forward.forward_kernel,
        "(peak + tl.math.log2(mass)) * LN_2",
        "(peak + tl.math.log2(mass))",
    ),
    Fault(
        "no delta",
        backward_query._query_step,
        "(dots - delta[:, None])",
        "dots",
        examine=check_gradients,
    ),
    Fault(
        "mask edge of gradients",
        backward_key._key_step,
        "< stop[None, :]",
        "<= stop[None, :]",
        examine=check_gradients,
    ),
    Fault(
        "one head of the group",
        backward_key.backward_key_kernel,
        "head = kv_head * GROUP + each",
        "head = kv_head * GROUP",
        "block per row",
        check_gradients,
    ),
    Fault(
        "slope of the soft-cap",
        primitives.cap_slope,
        "1 - level * level",
        "1 - level",
        "block per row",
        check_gradients,
    ),
    Fault(
        "share of the coarse gradient",
        backward_key.backward_key_kernel,
        "1 / tl.maximum(share, 1.0)",
        "1 / SIDE",
        "mra2 padded",
        check_gradients,
    ),
    Fault(
        "parts of a split are not rescaled",
        primitives.merged_mass,
        "mass * mine + more * theirs",
        "mass + more",
        "few queries",
    ),
    Fault(
        "one zero too few",
        pooling.pool_kernel,
        "mask=at < n_zeros",
        "mask=at < n_zeros - 1",
        "few queries",
    ),
    Fault(
        "offsets of 32 bits", primitives.load_rows, "rows.to(tl.int64)[:, None]", "rows[:, None]"
    ),
    Fault(
        "offsets of 32 bits in lists",
        lists.rows_at,
        "((entry & BLOCK) * SIDE).to(tl.int64) * stride",
        "((entry & BLOCK) * SIDE) * stride",
        "few queries",
    ),
    Fault(
        "offsets of 32 bits where registers are tight",
        lists.rows_at,
        "tokens_of(entry, SIDE, BN).to(tl.int64)",
        "tokens_of(entry, SIDE, BN)",
        "shared lists",
        check_gradients,
    ),
    Fault("ties go to the last", pairs.sort_keys, "(_LAST_INDEX - index)", "index"),
    Fault("the first to arrive goes on", threshold.head_threshold_kernel, "- 1:\n", "- 2:\n"),
    Fault(
        "a candidate is lost",
        threshold.head_threshold_kernel,
        "mask=one < count, other=0",
        "mask=one < count - 1, other=0",
    ),
    Fault(
        "no weight of the sink",
        forward.forward_kernel,
        "mass * decay + tl.math.exp2(sink - higher)",
        "mass * decay",
        "mra2 padded",
    ),
    Fault(
        "padding counts in means",
        pooling._pool_block,
        "counted & (real != 0)",
        "counted & (real >= 0)",
        "mra2 padded",
    ),
    Fault(
        "rows of padding compete",
        selection.open_kernel,
        "segment = tl.load(at + PADDING, mask=inside, other=0)",
        "segment = row * 0",
        "mra2 padded",
    ),
    Fault(
        "means of another head",
        selection.open_kernel,
        "head // GROUP * room * DV",
        "head % (heads // GROUP) * room * DV",
        "mra2 padded",
    ),
    Fault(
        "a starving row is left alone",
        selection.open_kernel,
        "rescued = tl.where(served, -1, rescued)",
        "rescued = tl.where(served, rescued, -1)",
        "sparse only",
    ),
    Fault(
        "a starving row is left alone, in one launch",
        short.choose_kernel,
        "served | (lowest == cols), -1, lowest",
        "lowest == cols, -1, -1",
        "odd widths",
    ),
    Fault(
        "keys of another head",
        backward_query.backward_query_kernel,
        "head // GROUP * skh",
        "head % (heads // GROUP) * skh",
        "mra2 padded",
        check_gradients,
    ),
    Fault(
        "the last row that has a column",
        backward_coarse._rows_with,
        "row + 1, 0",
        "row, 0",
        examine=check_gradients,
    ),
    Fault(
        "means of another head, per query",
        backward_query.backward_query_kernel,
        "flat // GROUP * cols * DV",
        "flat * cols * DV",
        "per query",
        check_gradients,
    ),
    Fault(
        "means of another group",
        backward_coarse.coarse_cols_kernel,
        "head = flat % (kv_heads * GROUP)",
        "head = each",
        "per query",
        check_gradients,
    ),
]


@contextmanager
def planted(fault):
    """The kernel with its fault; whoever calls it is compiled anew."""
    source = fault.kernel.src
    assert source.count(fault.old) >= 1, f"{fault.name}: {fault.old!r} isn't there any more"
    try:
        fault.kernel._unsafe_update_src(source.replace(fault.old, fault.new))
        _forget()
        yield
    finally:
        fault.kernel._unsafe_update_src(source)
        _forget()


def _forget():
    for name, module in list(sys.modules.items()):
        if name.startswith("mra_kernels._triton."):
            for value in vars(module).values():
                if isinstance(value, triton.runtime.jit.JITFunction):
                    value.hash = None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_found(fault):
    with planted(fault), pytest.raises((AssertionError, OutOfBounds)):
        on_random_calls(BY_NAME[fault.setting], fault.examine, CALLS)
