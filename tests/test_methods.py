"""The methods beside MRA: each against its own dense formula, and what all of them promise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from method_formulas import FORMULAS
from mra_cli.bench.single import BenchSetup, run_bench
from mra_cli.bench.workload import RandomWorkload, decode_call
from mra_cli.calls import AttentionCall
from mra_cli.causality import lookahead
from mra_cli.errors import InputError
from mra_cli.measure import relative_error
from mra_cli.methods import METHODS, REFUSED, make_method
from mra_cli.methods.base import Approximation, knob_for, mask_kind
from mra_cli.plan import Plan, SitePlan
from mra_kernels import AttentionMask
from mra_kernels.testing import make_qkv

OTHERS = {name: m for name, m in METHODS.items() if isinstance(m, Approximation)}
TRAINING_FREE = {name: m for name, m in OTHERS.items() if not m.about.calibrated}

KNOBS = {
    "smyrf": {"hashes": 3, "cluster": 8},
    "skein": {"columns": 9},
    "probsparse": {"rows": 7},
    "nystrom": {"landmarks": 6},
    "performer": {"features": 24},
    "scatterbrain": {"width": 10, "features": 24},
    "longformer": {"width": 10, "first": 2},
    "bigbird": {"block": 4, "random": 2},
    "h1d": {"block": 3},
    "combiner-fixed": {"segment": 7},
    "cluster-kv": {"clusters": 6},
    "topk": {"keys": 5},
    "window": {"width": 10},
    "vmean": {},
}
"""What to compute, said outright; a budget would come to something else at another length."""


def fixed(name, **more):
    return make_method(name, 0.25, {**KNOBS[name], **more})


def make_call(pattern, *, n=45, padding="none", dtype=torch.float64, **extras):
    """A call of ragged lengths; two batch entries, four heads that share two."""
    rows = n if pattern[1] == "S" else n - 8
    query, key, value = make_qkv(3, 2, 4, 2, rows, n, 8, 6, dtype)
    query, key = query / 2, key / 2  # peaked, but not so much that a few scores are all
    mask = AttentionMask.causal(n) if pattern == "CS" else AttentionMask.full(rows, n)
    if padding != "none":
        valid = torch.ones(2, n, dtype=torch.bool)
        valid[1, : n // 3] = False
        valid = valid if padding == "left" else valid.flip(1)
        mask = mask.with_padding(valid, valid if pattern[1] == "S" else None)
    return AttentionCall(query, key, value, mask, 0.3, **extras)


def assert_like_formula(method, call):
    result = method(call)
    expected = FORMULAS[method.name](call, method, result.plan.choice)
    rows = call.valid_rows[:, None].expand(expected.shape[:3])
    torch.testing.assert_close(result.output[rows], expected[rows], rtol=1e-9, atol=1e-10)
    assert torch.isfinite(result.output).all()
    return result


PATTERNS = [(name, kind) for name, m in TRAINING_FREE.items() for kind in m.about.patterns]


def test_every_method_has_a_formula():
    assert FORMULAS.keys() == KNOBS.keys() == TRAINING_FREE.keys()


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("name", "pattern"), PATTERNS)
def test_outputs_are_those_of_the_dense_formula(name, pattern, padding):
    assert_like_formula(fixed(name), make_call(pattern, padding=padding))


@pytest.mark.parametrize(("name", "pattern"), PATTERNS)
def test_what_else_enters_the_scores_is_honoured(name, pattern):
    honours = OTHERS[name].about.honours
    rows = 45 if pattern[1] == "S" else 37
    generator = torch.Generator().manual_seed(5)
    extras = {
        "softcap": 4.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64),
        "bias": torch.randn(1, 4, rows, 45, generator=generator, dtype=torch.float64),
    }
    words = {"softcap": "soft-cap"}
    taken = {k: v for k, v in extras.items() if words.get(k, k) in honours}
    if name == "vmean":  # its formula has no scores
        taken = {}
    if taken:
        assert_like_formula(fixed(name), make_call(pattern, **taken))
    long = make_call(pattern, n=80)
    for key, value in extras.items():
        if words.get(key, key) not in honours:
            reason = fixed(name).reason_for_exact(replace(long, **{key: value}))
            assert reason == f"{name} can't honour the {words.get(key, key)} of its scores"


@pytest.mark.parametrize("name", [n for n, m in TRAINING_FREE.items() if m.about.masks == "any"])
def test_any_mask_is_honoured(name):
    """A sliding window, and a matrix that is no interval."""
    call = make_call("CS")
    window = AttentionMask.causal(45, window=17)
    dense = torch.rand(2, 45, 45, generator=torch.Generator().manual_seed(1)) < 0.6
    dense |= torch.eye(45, dtype=torch.bool)
    for mask in (window, AttentionMask.from_dense(dense)):
        if name == "bigbird" and mask.dense is not None:
            mask = replace(mask, key_valid=None)
        assert_like_formula(fixed(name), replace(call, mask=mask))


@pytest.mark.parametrize("name", [n for n, m in TRAINING_FREE.items() if m.about.masks != "any"])
def test_masks_that_cannot_be_honoured_are_refused(name):
    call = make_call("CS", n=80)
    window = replace(call, mask=AttentionMask.causal(80, window=20))
    assert mask_kind(window.mask) == "any" and mask_kind(call.mask) == "causal"
    assert name in str(fixed(name).reason_for_exact(window))
    refused = fixed(name).reason_for_exact(call) is not None
    assert refused == (OTHERS[name].about.masks == "padding")


IDENTITIES = {
    "smyrf": {"cluster": 45},
    "skein": {"columns": 45},
    "probsparse": {"rows": 45},
    "scatterbrain": {"width": 90},
    "longformer": {"width": 90},
    "bigbird": {"block": 45},
    "h1d": {"block": 45},
    "combiner-fixed": {"segment": 45},
    "cluster-kv": {"clusters": 45, "iterations": 0},
    "topk": {"keys": 45},
    "window": {"width": 90},
}


@pytest.mark.parametrize(
    ("name", "pattern"), [(name, kind) for name, kind in PATTERNS if name in IDENTITIES]
)
def test_with_all_it_can_spend_it_is_exact(name, pattern):
    call = make_call(pattern, padding="right")
    result = fixed(name, **IDENTITIES[name])(call)
    assert relative_error(result.output, call.exact(), call.valid_rows).max() < 1e-9
    if OTHERS[name].about.budgets == "scores":
        if name != "smyrf":  # which counts what it computes again and again
            torch.testing.assert_close(result.density, torch.ones(2, 4))
        full = make_method(name, 1.0)(call)
        assert relative_error(full.output, call.exact(), call.valid_rows).max() < 1e-9


def test_nystrom_with_a_landmark_per_token_and_time_to_invert_is_exact():
    call = make_call("NS", n=24)
    call = replace(call, query=call.key.repeat_interleave(2, 1), scaling=2.0)  # well-conditioned
    result = make_method("nystrom", 0.5, {"landmarks": 24, "iterations": 60})(call)
    assert relative_error(result.output, call.exact(), call.valid_rows).max() < 1e-6


def test_more_features_come_nearer():
    call, errors = replace(make_call("NS"), scaling=0.1), []
    for features in (16, 256, 4096):
        output = fixed("performer", features=features)(call).output
        errors.append(float(relative_error(output, call.exact(), call.valid_rows).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


# --- padding, seeds, time ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_a_short_row_of_a_batch_comes_out_as_alone(name):
    """Ragged lengths: padding, and what else is in the batch, change nothing."""
    more = {"random": 0} if name == "bigbird" else {}  # its lot falls on other blocks
    more |= {"landmarks": 6} if name == "nystrom" else {}
    pattern = OTHERS[name].about.patterns[0]
    call = make_call(pattern, padding="right")
    together = fixed(name, **more)(call).output
    length = int(call.mask.key_valid[1].sum())
    tensors = {key: getattr(call, key)[1:, :, :length] for key in ("query", "key", "value")}
    alone = AttentionCall(**tensors, mask=AttentionMask.full(length, length), scaling=0.3)
    torch.testing.assert_close(fixed(name, **more)(alone).output, together[1:, :, :length])


@pytest.mark.parametrize("name", [n for n, m in TRAINING_FREE.items() if "seed" in m.knobs])
def test_the_seed_decides_and_nothing_else(name):
    call = make_call("NS")
    first, again, other = (fixed(name, seed=seed)(call).output for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, m in TRAINING_FREE.items() if "CS" in m.about.patterns])
def test_causality(name):
    """A run on the first half agrees with the first half of the whole run, unless a method says
    that it looks ahead."""
    call = make_call("CS", n=64)
    whole = fixed(name)(call).output
    moved = lookahead(lambda changed: fixed(name)(changed).output, call, whole, "CS")
    assert (moved > 1e-6) == OTHERS[name].about.looks_ahead
    if moved < 1e-6 and name != "bigbird":  # whose random blocks are drawn for a length
        tensors = {key: getattr(call, key)[:, :, :32] for key in ("query", "key", "value")}
        first = AttentionCall(**tensors, mask=AttentionMask.causal(32), scaling=0.3)
        torch.testing.assert_close(fixed(name)(first).output, whole[:, :, :32])


def test_exact_attention_passes_the_causality_test():
    call = make_call("CS")
    assert lookahead(lambda changed: changed.exact(), call, call.exact(), "CS") < 1e-12
    full = replace(call, mask=AttentionMask.full(45, 45))
    assert lookahead(lambda changed: changed.exact(), full, full.exact(), "CS") > 0.1
    assert lookahead(lambda changed: changed.exact(), full, full.exact(), "NS") is None


# --- what a budget comes to --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "pattern"), [(n, p) for n, p in PATTERNS if OTHERS[n].about.budgets != "nothing"]
)
def test_budgets_are_kept(name, pattern, budget):
    """Of exact scores, or of multiply-adds, whichever the method says; within what its smallest
    steps allow at this length."""
    n = 256
    rows = n if pattern[1] == "S" else n // 2
    query, key, value = make_qkv(0, 1, 2, 2, rows, n, 32, 32, torch.float32)
    mask = AttentionMask.causal(n) if pattern == "CS" else AttentionMask.full(rows, n)
    call = AttentionCall(query, key, value, mask, 32**-0.5)
    method = make_method(name, budget)
    result = method(call)
    if method.about.budgets == "scores":
        assert float(result.density.mean()) == pytest.approx(budget, rel=0.25)
        return
    assert float(result.density.max()) < budget
    work = method.multiply_adds(call, result) / (call.legal_entries * 64)
    least = {"performer": 0.45, "scatterbrain": 0.75}.get(name, 0.0)  # masked blocks of 64 rows
    assert work == pytest.approx(budget, rel=0.15) or work < least


def test_knobs_come_nearest():
    assert [knob_for(b, lambda k: k * 10.0, 100) for b in (1.0, 14.0, 16.0, 5000.0)] == [
        1,
        1,
        2,
        100,
    ]


def test_bench_checks_them_all_in_float64():
    names = [n for n in TRAINING_FREE if "NS" in OTHERS[n].about.patterns]
    setup = BenchSetup((128,), tuple(METHODS[n] for n in names), (0.25,), pairs=1)
    report = run_bench(RandomWorkload(("NS",), 4, 2, 16), setup)
    assert [row.method for row in report.rows] == names
    assert {row.status for row in report.rows} == {"ok"}


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_plans_keep_settings(name):
    method = make_method(name, 0.3, KNOBS.get(name))
    plan = Plan({"a.b": SitePlan(method)})
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("smyrf", {"cluster": "x"}, "cluster must be a number like 4; got 'x'"),
        ("smyrf", {"cluster": 2.5}, "cluster must be a number like 4; got 2.5"),
        ("smyrf", {"hashes": "0"}, "hashes must be at least 1, got 0"),
        (
            "smyrf",
            {"hashs": "2"},
            "smyrf has the settings hashes, cluster, seed; got 'hashs'; did you mean 'hashes'",
        ),
        ("smyrf", {"budget": "0.1"}, "got 'budget'; leave it out"),
        ("vmean", {"width": "8"}, "vmean has the settings no settings; got 'width'; leave it out"),
        ("nystrom", {"landmarks": "0"}, "landmarks must be at least 1"),
        ("performer", {"features": "-1"}, "features must be at least 1"),
        ("window", {"width": "1"}, "width must be at least 2"),
        ("longformer", {"first": "-1"}, "first must be at least 0"),
        ("bigbird", {"random": "-1"}, "random must be at least 0"),
        ("h1d", {"block": "0"}, "block must be at least 1"),
        ("topk", {"keys": "0"}, "keys must be at least 1"),
    ],
)
def test_settings_that_will_not_do(name, options, says):
    with pytest.raises(InputError, match=says):
        make_method(name, 0.25, options)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_training_are_refused(name):
    with pytest.raises(InputError, match=f"{name} needs a model trained with it: .*; choose"):
        make_method(name, 0.25)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_short_calls_stay_exact(name):
    assert "too few to gain anything" in fixed(name).reason_for_exact(make_call("NS"))
    assert fixed(name).reason_for_exact(make_call("NS", n=64)) is None


@pytest.mark.parametrize("name", ["window", "h1d", "combiner-fixed", "scatterbrain"])
def test_two_sequences_are_not_one(name):
    assert "of two" in fixed(name).reason_for_exact(make_call("NC", n=90))


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_gradients_are_those_of_the_formula(name):
    call = make_call(OTHERS[name].about.patterns[0], n=30)
    choice = fixed(name)(call).plan.choice
    found = []
    for attend in (
        lambda call: fixed(name)(call).output,
        lambda call: FORMULAS[name](call, fixed(name), choice),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in (call.query, call.key, call.value)]
        output = attend(replace(call, query=leaves[0], key=leaves[1], value=leaves[2]))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        found.append(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True))
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    for name in TRAINING_FREE:
        call = make_call(OTHERS[name].about.patterns[0], n=80, padding="right", dtype=dtype)
        result = fixed(name)(call)
        assert result.output.dtype == dtype
        expected = fixed(name).in_float64(call, result, 4)
        off = relative_error(result.output, expected, call.valid_rows)
        assert off.max() < torch.finfo(dtype).eps


def test_long_groups_are_computed_in_pieces(monkeypatch):
    """Memory is bounded by rows at once, whatever a method puts into one group."""
    for name in TRAINING_FREE:
        call = make_call(OTHERS[name].about.patterns[0], padding="left")
        whole = fixed(name)(call).output
        with monkeypatch.context() as few:
            few.setattr("mra_cli.methods.rows._FLOATS_IN_FLIGHT", 3000)
            torch.testing.assert_close(fixed(name)(call).output, whole)


@pytest.mark.parametrize("name", [n for n, m in TRAINING_FREE.items() if "CS" in m.about.patterns])
def test_decoding_is_refused_or_agrees_with_the_last_rows(name):
    """New queries against a full cache, as `bench --decode` asks for them."""
    call = make_call("CS", n=64)
    last = decode_call(call, 3)
    if fixed(name).reason_against_call(last) is not None:
        assert "at once" in fixed(name).reason_against_call(last)
        return
    assert fixed(name).reason_against_call(call) is None
    if OTHERS[name].about.looks_ahead:  # chooses by other queries, too
        assert torch.isfinite(fixed(name)(last).output).all()
        return
    whole = fixed(name)(call).output[:, :, -3:]
    torch.testing.assert_close(fixed(name)(last).output, whole)
