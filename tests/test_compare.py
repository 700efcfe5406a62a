"""`compare`: methods side by side, what it makes of them, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from architectures import ARCHITECTURES
from mra_cli.calls import AttentionCall
from mra_cli.checkpoint import Checkpoint
from mra_cli.compare.choice import BASELINES, choose_methods
from mra_cli.compare.entropy import entropy_bins, squared_sums
from mra_cli.compare.plots import draw
from mra_cli.compare.report import ENTROPY_EDGES, CompareReport, kendall_tau, pareto
from mra_cli.compare.run import compare, compare_models
from mra_cli.errors import InputError
from mra_cli.evaluate import Judge
from mra_cli.inputs import Samples
from mra_cli.methods import METHODS
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.sites import find_sites
from mra_kernels import AttentionMask
from mra_kernels.testing import make_qkv

LENGTHS = {"bert": 96, "llama-gqa": 96, "bart": 120, "t5": 120}


def tiny(name: str) -> tuple[Checkpoint, Samples]:
    model = next(a for a in ARCHITECTURES if a.name == name).build()
    generator = torch.Generator().manual_seed(0)
    length = LENGTHS[name]
    batch = {"input_ids": torch.randint(10, 90, (1, length), generator=generator)}
    if model.config.is_encoder_decoder:
        ids = torch.randint(10, 90, (1, 80), generator=generator)
        batch["decoder_input_ids"] = ids
    samples = Samples([batch], "random tokens", "none", length)
    return Checkpoint(name, model, None, None, "none"), samples


@pytest.fixture(scope="module")
def report() -> CompareReport:
    names = "smyrf,skein,nystrom,h1d,performer,topk"
    methods = choose_methods(names, 0.2, {"smyrf.hashes": "2"})
    return compare_models([tiny("bert"), tiny("llama-gqa"), tiny("bart")], methods, [0.2, 1.0])


def test_figures_hang_together(report):
    bert, llama, bart = report.models
    assert [model.kinds for model in report.models] == [("NS",), ("CS",), ("NS", "CS", "CC")]
    for model in report.models:
        for row in model.rows:
            assert len(row.by_entropy) == len(ENTROPY_EDGES)
            assert {site.kind for site in model.sites} >= {row.kind}
            assert row.kind in METHODS[row.method].about.patterns
            assert (row.lookahead is None) == (row.kind[0] == "N")
            if row.kind == "CS" and not METHODS[row.method].about.looks_ahead:
                assert row.lookahead < 1e-5, row
            if row.kind == "CS" and row.method == "smyrf" and row.budget < 1:
                assert row.lookahead > 0.01
            assert 0 <= row.density <= 1.001 and row.multiply_adds > 0
            assert row.exact_ms > 0 and row.method_bytes > 0
            if row.budget == 1.0 and row.matched == "scores":
                assert row.error < 1e-5, row
        for kind, shares in model.entropy_rows.items():
            assert kind in model.kinds and sum(shares) == pytest.approx(1.0)
    assert {row.method for row in bert.rows} == {row.method for row in bert.rows} | set(BASELINES)
    absent = {(e.kind, e.method) for e in llama.excluded}
    assert {("CS", "skein"), ("CS", "nystrom")} == absent
    assert all("serves NS" in e.reason for e in llama.excluded)
    assert ("CC", "window") in {(e.kind, e.method) for e in bart.excluded}


def test_vmean_is_the_same_at_every_budget(report):
    for model in report.models:
        for kind in model.kinds:
            rows = [r for r in model.rows if (r.method, r.kind) == ("vmean", kind)]
            assert [row.budget for row in rows] == [0.2, 1.0]
            assert replace(rows[0], budget=1.0) == rows[1]


def test_whole_models_are_judged_at_the_sites_that_a_method_serves(report):
    checkpoint, samples = tiny("bart")
    bart = report.models[2]
    found = {(w.method, w.budget): w for w in bart.whole}
    sites = find_sites(checkpoint.model, samples.batches[0])
    served = {kind: sum(site.kind == kind for site in bart.sites) for kind in bart.kinds}
    assert found["h1d", 0.2].sites == served["NS"] + served["CS"]
    assert found["nystrom", 0.2].sites == served["NS"]
    judge = Judge(checkpoint.model, samples.batches, None)
    with patched(checkpoint.model, Plan.uniform(sites, METHODS["vmean"])):
        assert judge.judge() == found["vmean", 0.2].damage
    assert found["vmean", 0.2].sites == len(bart.sites)


def harm(damage) -> float:
    return 1 - damage.cosine_mean if damage.kl is None else damage.kl


def test_attention_is_worth_something(report):
    checkpoint, _ = tiny("bert")
    for model in report.models:
        assert [entry.site for entry in model.ablations] == ["all", *(s.name for s in model.sites)]
        whole = model.ablations[0]
        vmean = next(w for w in model.whole if w.method == "vmean")
        # At all sites, the mean of V is the method vmean.
        assert harm(whole.mean) == pytest.approx(harm(vmean.damage), abs=1e-6)
        assert abs(harm(whole.nothing) - harm(whole.mean)) > 1e-3
    assert len(report.models[0].sites) == checkpoint.model.config.num_hidden_layers


def test_rankings_are_compared(report):
    agreements = report.agreements
    places = {(a.first, a.second) for a in agreements}
    assert ("bert NS", "llama-gqa CS") in places and ("bart NS", "bart CS") in places
    assert len(places) == 5 * 4 / 2
    for entry in agreements:
        assert -1 <= entry.tau <= 1 and entry.methods >= 3


def test_the_same_again_gives_the_same_errors(report):
    methods = choose_methods("smyrf,skein,nystrom,h1d,performer,topk", 0.2, {"smyrf.hashes": "2"})
    again = compare(*tiny("bert"), methods, [0.2])
    first = [row for row in report.models[0].rows if row.budget == 0.2]
    assert [row.layers for row in again.rows] == [row.layers for row in first]
    assert [row.by_entropy for row in again.rows] == [row.by_entropy for row in first]


def test_a_report_survives_json(report):
    assert CompareReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["agreements"][0]["methods"] >= 3
    for text in ("{}", "[", '{"schema": 7}'):
        with pytest.raises(InputError):
            CompareReport.from_json(text)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_has_every_method_and_the_front(report, kind):
    report = replace(report, models=report.models[:1])
    picture = draw(report, kind)
    if kind == "png":
        assert picture.startswith(b"\x89PNG")
        return
    text = picture.decode()
    names = {row.method for row in report.models[0].rows}
    for label in names | {"exact", "vmean", "mra", "Pareto front"}:
        assert f">{label}</text>" in text
    assert draw(report, kind) == picture


def test_a_bias_is_refused_by_name():
    """T5's encoder: methods that can't carry a bias say so, others take it."""
    found = compare(*tiny("t5"), choose_methods("longformer,nystrom", 0.3, {}), [0.3])
    reasons = {(e.kind, e.method): e.reason for e in found.excluded}
    assert reasons["NS", "nystrom"] == "nystrom can't honour the bias of its scores"
    assert "longformer" in {row.method for row in found.rows if row.kind == "NS"}


def test_nothing_to_compare():
    checkpoint, samples = tiny("bert")
    short = replace(samples, batches=[{"input_ids": samples.batches[0]["input_ids"][:, :70]}])
    found = compare(checkpoint, short, choose_methods("mra", 0.3, {}), [0.3])
    assert found.rows
    methods = [METHODS["skein"], METHODS["nystrom"]]
    with pytest.raises(InputError, match="nothing to compare: serves NS, NC"):
        compare(*tiny("llama-gqa"), methods, [0.3])


# --- parts -------------------------------------------------------------------------------------


def test_entropy_bins_and_sums():
    query, key, value = make_qkv(0, 2, 4, 2, 40, 40)
    sharp = torch.tensor([1e-9, 0.4, 1.0, 60.0]).repeat_interleave(10)[:, None]
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 30:] = False
    mask = AttentionMask.full(40, 40).with_padding(valid, valid)
    call = AttentionCall(query * sharp, key, value, mask, 1.0)
    bins = entropy_bins(call)
    weights = (
        (call.query @ key.repeat_interleave(2, 1).transpose(2, 3))
        .masked_fill(~valid[:, None, None], -torch.inf)
        .softmax(-1)
    )
    entropy = -torch.xlogy(weights, weights).sum(-1) / valid.sum(1).log()[:, None, None]
    expected = sum((entropy > edge).long() for edge in ENTROPY_EDGES[:-1])
    assert torch.equal(bins, expected.masked_fill(~valid[:, None], -1))
    assert bins[0, :, :10].min() == 4 and bins[0, :, 30:].max() <= 1
    sums = squared_sums(call.query, bins)
    for number in range(5):
        picked = call.query[bins == number]
        assert float(sums[number]) == pytest.approx(float(picked.square().sum()))


def test_pareto_and_tau():
    points = [(1.0, 0.0), (0.5, 0.5), (0.6, 0.6), (0.5, 0.4), (0.1, 0.9), (0.1, 0.9)]
    assert pareto(points) == [0, 3, 4, 5]
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_what_it_shows(cli, bert, text, tmp_path):
    arguments = ("--methods", "h1d,nystrom", "--budget", "0.3", "--samples", "1", "--text", text)
    files = ("--json", tmp_path / "it.json", "--plot", tmp_path / "it.png")
    ran = cli("compare", bert, *arguments, *files)
    assert ran.code == 0, ran
    for part in ("h1d", "vmean", "exact", "nothing instead", "Pareto"):
        assert part in ran.out
    found = CompareReport.from_json((tmp_path / "it.json").read_text())
    assert {row.method for row in found.models[0].rows} == {"h1d", "nystrom", *BASELINES}
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--methods", "mra9"], 1, ["method must be one of", "got 'mra9'", "did you mean 'mra"]),
        (["--methods", "yoso"], 1, ["yoso needs a model trained with it", "choose another"]),
        (
            ["--methods", "linformer"],
            1,
            ["linformer has to be fitted to the model first", "mra-cli calibrate"],
        ),
        (["--set", "hashes=8"], 1, ["--set must name a method", "smyrf.hashes=8", "got hashes=8"]),
        (["--set", "smyrf.hash=8"], 1, ["smyrf has the settings", "did you mean 'hashes'"]),
        (
            ["--methods", "mra", "--set", "smyrf.hashes=8"],
            1,
            ["--set is for the methods compared", "got 'smyrf'", "add it to --methods"],
        ),
        (["--plot", "it.pdf"], 2, ["--plot", ".png or .svg", "got it.pdf"]),
        (["--plot", "/nowhere/it.png"], 2, ["--plot", "can't write /nowhere/it.png"]),
        (["--budget", "2"], 2, ["--budget", r"\(0, 1\]"]),
        (["--samples", "0"], 2, ["--samples"]),
        (["--layers", "9"], 1, ["--layers must name patchable sites", "got '9'"]),
        (["--seq-len", "999"], 1, ["positions", "got --seq-len 999"]),
    ],
)
def test_bad_input(refuses, bert, text, arguments, code, says):
    refuses("compare", bert, "--text", text, *arguments, code=code, says=says)


def test_progress_goes_from_start_to_end():
    told = []
    methods = [METHODS["window"], METHODS["vmean"]]
    compare(*tiny("bert"), methods, [0.2, 0.4], progress=lambda *step: told.append(step))
    _, *steps = told  # the first looks for sites
    assert [done for _, done, _ in steps] == [*range(len(steps))]
    assert {total for *_, total in steps} == {len(steps)}
    assert any("measuring encoder.layer.1" in stage for stage, *_ in steps)
