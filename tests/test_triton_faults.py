"""Faults planted in the kernels, one at a time: the random calls must find each."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles Triton kernels"),
]
triton = pytest.importorskip("triton")

from mra_kernels._triton import (  # noqa: E402
    backward,
    forward,
    lists,
    pairs,
    pooling,
    primitives,
    short,
    threshold,
)
from triton_cases import (  # noqa: E402
    SETTINGS,
    calls,
    check,
    check_gradients,
    launched_by,
    plainly,
)
from triton_cpu import Executor, OutOfBounds  # noqa: E402

BY_NAME = {setting.name: setting for setting in SETTINGS}


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
        short._lowest_paid,
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
        "at = flat * rows + first_row",
        "at = flat * rows",
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
        backward._query_step,
        "(dots - delta[:, None])",
        "dots",
        examine=check_gradients,
    ),
    Fault(
        "mask edge of gradients",
        backward._key_step,
        "< stop[None, :]",
        "<= stop[None, :]",
        examine=check_gradients,
    ),
    Fault(
        "one head of the group",
        backward.backward_key_kernel,
        "head = kv_head * GROUP + each",
        "head = kv_head * GROUP",
        "block per row",
        check_gradients,
    ),
    Fault(
        "slope of the soft-cap",
        backward._cap_slope,
        "1 - level * level",
        "1 - level",
        "block per row",
        check_gradients,
    ),
    Fault(
        "share of the coarse gradient",
        backward.backward_key_kernel,
        "1 / tl.maximum(share, 1.0)",
        "1 / SIDE",
        "mra2 padded",
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


def examined(setting, examine):
    """A dozen random calls, or fewer if one fails."""

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        call = data.draw(calls(BY_NAME[setting]))
        with Executor(ones=False), launched_by(plainly, BY_NAME[setting].in_tiles):
            examine(call)

    run()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_found(fault):
    with planted(fault), pytest.raises((AssertionError, OutOfBounds)):
        examined(fault.setting, fault.examine)


@pytest.mark.parametrize("setting", sorted({fault.setting for fault in FAULTS}))
def test_without_faults_all_is_well(setting):
    """The same dozen; also after faults were planted and removed."""
    examined(setting, check)
    examined(setting, check_gradients)
