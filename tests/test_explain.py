"""`explain`: the parts of attention against their definitions, and what a method loses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mra_cli.calls import AttentionCall
from mra_cli.explain import parts
from mra_cli.explain.measure import _of_head, explain
from mra_cli.explain.report import PARTS, ExplainReport
from mra_cli.explain.weights import approximated_rows, exact_rows, legal_rows
from mra_cli.inputs import make_samples
from mra_cli.methods import make_method
from mra_kernels import AttentionMask


def problem(rows: int, keys: int, width: int, seed: int = 0, sharp: float = 2.0):
    """Attention rows, values and legal keys, the last of which hides some at the end."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(rows, keys, generator=generator, dtype=torch.float64)
    legal = torch.arange(keys) < torch.linspace(keys // 2, keys, rows)[:, None]
    values = torch.randn(keys, width, generator=generator, dtype=torch.float64)
    weights = logits.masked_fill(~legal, -torch.inf).softmax(-1)
    return weights, values * legal[..., None], legal


@pytest.mark.parametrize(("keys", "width"), [(60, 8), (200, 32), (9, 16)])
@pytest.mark.parametrize("sharp", [0.5, 3.0, 12.0])
def test_every_part_gives_the_same_output(keys, width, sharp):
    weights, values, legal = problem(5, keys, width, sharp=sharp)
    both = parts.span(parts.with_ones(values, legal))
    found = {
        "effective": parts.projected(weights, parts.span(values)),
        "sum 1": parts.projected(weights, both),
        "least norm": parts.least_norm(weights, both, legal),
        "fewest": parts.fewest_keys(weights, both, legal),
    }
    output = torch.einsum("rm,rmd->rd", weights, values)
    for name, part in found.items():
        same = torch.einsum("rm,rmd->rd", part, values)
        assert (same - output).norm(dim=-1).div(output.norm(dim=-1)).max() < 1e-7, name
        assert not part[~legal].any(), name
        if name != "effective":
            assert part.sum(-1) == pytest.approx(1.0, abs=1e-7), name
    for name in ("least norm", "fewest"):
        assert (found[name] >= 0).all()
    norms = [part.norm(dim=-1) for part in (*found.values(), weights)]
    assert (norms[0] <= norms[1] + 1e-9).all(), "the sum is one more condition"
    assert (norms[1] <= norms[2] + 1e-9).all(), "and being nonnegative another"
    assert (norms[2] <= norms[3] + 1e-9).all() and (norms[2] <= norms[4] + 1e-9).all()
    support = (found["fewest"] > 1e-12).sum(-1)
    assert (support <= torch.minimum(legal.sum(-1), torch.tensor(width + 1))).all()


def test_the_effective_part_against_the_pseudo_inverse():
    """Brunner et al.: what is left after the projection on the left null space is taken away."""
    weights, values, _ = problem(4, 40, 6)
    for row, seen in zip(weights, values, strict=True):
        onto = torch.from_numpy(seen.numpy() @ np.linalg.pinv(seen.numpy()))
        ours = parts.projected(row, parts.span(seen))
        assert torch.allclose(ours, onto @ row, atol=1e-12)
        null = row - ours
        assert (null @ seen).abs().max() < 1e-12


def test_the_least_norm_against_a_general_solver():
    weights, values, legal = problem(3, 14, 3, sharp=1.5)
    found = parts.least_norm(weights, parts.span(parts.with_ones(values, legal)), legal)
    for row, seen, may, ours in zip(weights, values, legal, found, strict=True):
        a = torch.cat([seen[may], torch.ones(int(may.sum()), 1)], 1).numpy()
        target = a.T @ row[may].numpy()
        solved = minimize(
            lambda p: p @ p,
            row[may].numpy(),
            jac=lambda p: 2 * p,
            bounds=[(0, None)] * len(a),
            constraints={"type": "eq", "fun": lambda p, a=a, t=target: a.T @ p - t},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert solved.success
        assert ours[may].numpy() == pytest.approx(solved.x, abs=1e-6)


def test_rank_counts_what_the_dtype_can_tell():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(50, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    eps = torch.finfo(torch.float32).eps
    assert int(parts.numerical_rank(low.double(), eps)) == 3
    assert int(parts.numerical_rank(low.double()[:2], eps)) == 2
    weights, *_ = problem(1, 50, 8)
    part = parts.projected(weights, parts.span(low.double()))
    assert torch.allclose(part @ low.double(), weights @ low.double(), atol=1e-10)


def call(kv_heads: int = 2, sinks: bool = False, causal: bool = True) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(1, h, 96, 16, generator=generator) for h in (4, kv_heads, kv_heads)]
    mask = AttentionMask.causal(96) if causal else AttentionMask.full(96, 96)
    extra = torch.randn(4, generator=generator) if sinks else None
    return AttentionCall(*made, mask, 0.25, softcap=5.0 if sinks else None, sinks=extra)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_weights_give_the_call_s_output(sinks):
    some = call(sinks=sinks)
    rows = torch.tensor([0, 5, 40, 95])
    weights = exact_rows(some, rows)
    output = weights @ some.value.double().repeat_interleave(2, 1)
    assert torch.allclose(output, some.exact()[:, :, rows].double(), atol=1e-5)
    assert not weights[~legal_rows(some, rows).expand_as(weights)].any()
    if not sinks:
        assert weights.sum(-1) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["mra", "mra2"])
def test_approximated_rows_give_the_method_s_output(name):
    some, method = call(), make_method(name, 0.3)
    rows = torch.tensor([3, 50, 95])
    weights = approximated_rows(method, some, rows)
    output = weights @ some.value.double().repeat_interleave(2, 1)
    assert torch.allclose(output, method(some).output[:, :, rows].double(), atol=1e-5)
    exact = exact_rows(some, rows)
    assert not torch.allclose(weights, exact, atol=1e-3)
    everything = approximated_rows(method.with_budget(1.0), some, rows)
    assert torch.allclose(everything, exact, atol=1e-5)


def test_what_is_lost_splits_into_seen_and_unseen():
    weights, values, legal = problem(6, 80, 8)
    generator = torch.Generator().manual_seed(3)
    off = 0.01 * torch.randn(weights.shape, generator=generator, dtype=torch.float64) * legal
    found = _of_head(weights, values[-1], legal, weights + off, 1e-7)
    whole, _, effective, _, output, _ = found.lost.unbind(-1)
    assert (effective < 0.5 * whole).all(), "80 keys, 8 dimensions: most of it is unseen"
    same = torch.einsum("rm,rmd->rd", off, values).square().sum(-1)
    assert torch.allclose(output, same, rtol=1e-9)
    exact = _of_head(weights, values[-1], legal, weights, 1e-7)
    assert not exact.lost[:, [0, 2, 4]].any()


@pytest.mark.checkpoints
def test_minilm(minilm):
    samples = make_samples(minilm, seq_len=256, count=1)
    report = explain(minilm, samples, make_method("mra", 0.25), rows=2, layers="2,5")
    assert report.failed == []
    assert len(report.heads) == 2 * 12
    for head in report.heads:
        assert (head.rank_low, head.rank_high) == (32, 32)
        assert [part.part for part in head.parts] == list(PARTS)
        assert head.parts[3].keys <= 33
        assert head.parts[2].total_variation is not None and head.parts[0].hellinger is None
        assert head.lost is not None and 0 < head.lost.unseen < 1
    again = ExplainReport.from_json(report.to_json())
    assert again == report
    quick = dataclasses.replace(report, seconds=0.0, provenance=None)
    rerun = explain(minilm, samples, make_method("mra", 0.25), rows=2, layers="2,5")
    assert dataclasses.replace(rerun, seconds=0.0, provenance=None) == quick


def test_the_command(cli, bert, text, tmp_path):
    target = tmp_path / "it.json"
    ran = cli("explain", bert, "--text", text, "--seq-len", "96", "--rows", "2", "--json", target)
    assert ran.code == 0, ran
    assert "least norm" in ran.out and "What mra at budget 0.25 loses" in ran.out
    assert json.loads(target.read_text())["schema"] == 1


def test_without_scipy(refuses, bert, monkeypatch):
    found = parts.importlib.util.find_spec
    monkeypatch.setattr(
        parts.importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name)
    )
    refuses("explain", bert, says=["needs the package scipy", r"pip install 'mra-cli\[explain\]'"])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--budget", "0.1,0.2"), 2, ["--budget", "expected one number", "got 0.1,0.2"]),
        (("--rows", "0"), 2, ["--rows"]),
        (("--method", "mrax"), 1, ["method must be one of", "did you mean 'mra"]),
        (("--layers", "7"), 1, ["--layers must name patchable sites", "got '7'"]),
    ],
)
def test_refused(refuses, bert, text, arguments, code, says):
    refuses("explain", bert, "--text", text, *arguments, code=code, says=says)
