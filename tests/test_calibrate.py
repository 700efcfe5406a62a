"""`calibrate`: fits that help, the same bytes whatever happens, and methods against formulas."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from architectures import ARCHITECTURES
from mra_cli.analyze import analyze
from mra_cli.calibrate import calibrate as module
from mra_cli.calibrate.calibrate import calibrate, make_fit
from mra_cli.calibrate.fits import Captured, descend
from mra_cli.calibrate.gold import entmax15, gold, logits_of, quality
from mra_cli.calibrate.linformer import LinformerFit, run_means
from mra_cli.calibrate.sbm import SbmFit
from mra_cli.calibrate.sparsefinder import SparsefinderFit, k_means
from mra_cli.calibrate.tff import TffFit
from mra_cli.calls import AttentionCall
from mra_cli.errors import InputError
from mra_cli.inputs import make_samples
from mra_cli.measure import relative_error
from mra_cli.methods import check_model, make_method
from mra_cli.methods.calibration import band, read_calibration
from mra_cli.methods.sparsefinder import Pairs, by_edges, by_rank
from mra_cli.methods.tff import kernel
from mra_cli.patching import intercepted
from mra_cli.sites import Site
from mra_kernels import AttentionMask

N, D, HEADS, KV = 96, 8, 4, 2

QUICK = {
    "sparsefinder": {"steps": 20, "rows": 32},
    "tff": {"steps": 30, "accept": 10.0},
    "linformer": {"steps": 6, "ranks": (16, 48)},
    "sbm": {"steps": 20, "clusters": 8, "rows": 32},
}


def made(seed: int, causal: bool = False, batch: int = 1, lengths=None) -> AttentionCall:
    """Queries and keys whose dot products have structure to find: a few directions matter."""
    chance = torch.Generator().manual_seed(seed)
    basis = torch.randn(HEADS, 3, D, generator=torch.Generator().manual_seed(99))
    query = torch.randn(batch, HEADS, N, 3, generator=chance) @ basis * 1.5
    key = torch.randn(batch, KV, N, 3, generator=chance) @ basis[::2] * 1.5
    value = torch.randn(batch, KV, N, D, generator=chance)
    mask = AttentionMask.causal(N) if causal else AttentionMask.full(N, N)
    if lengths is not None:
        valid = torch.arange(N) < torch.tensor(lengths)[:, None]
        mask = mask.with_padding(valid, valid)
    return AttentionCall(query, key, value, mask, D**-0.5)


def captured(kind: str = "NS", samples: int = 3) -> Captured:
    calls = [made(seed, kind[0] == "C") for seed in range(samples)]
    site = Site("site", kind, HEADS, KV, D, D, None, (), None, 1, "patch", "")
    return Captured(site, calls[:-1], calls[-1:])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A calibration of each method, of made-up calls, by method and kind of site."""
    folder, written = tmp_path_factory.mktemp("calibrations"), {}

    def file(name: str, kind: str = "NS"):
        if (name, kind) not in written:
            fit = make_fit(name, QUICK[name])
            fitted = fit(captured(kind), torch.Generator().manual_seed(0))
            found = {"kind": kind, **fitted.found}
            header = {
                "schema": 1,
                "method": name,
                "model": "made up",
                "fingerprint": "sha256:0",
                "length": N,
                "options": dataclasses.asdict(fit),
                "sites": {"site": found},
            }
            path = folder / f"{name}-{kind}.safetensors"
            tensors = {f"site|{key}": x.contiguous() for key, x in fitted.tensors.items()}
            metadata = {module.CALIBRATION_KEY: json.dumps(header)}
            path.write_bytes(module.save(tensors, metadata=metadata))
            written[name, kind] = path
        return written[name, kind]

    return file


@pytest.fixture
def method(files):
    def make(name: str, budget: float = 0.3, kind: str = "NS", **settings):
        options = {"calibration": str(files(name, kind)), **settings}
        return make_method(name, budget, options).at("site")

    return make


def dense(call: AttentionCall):
    """Scores, repeated values and legal pairs of a call in float64."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    k, v = k.repeat_interleave(HEADS // KV, 1), v.repeat_interleave(HEADS // KV, 1)
    legal = call.mask.rows(0, N)[:, None]
    scores = (call.scaling * q @ k.transpose(2, 3)).masked_fill(~legal, -torch.inf)
    return scores, v, legal


# --- what is to be predicted -----------------------------------------------------------------


def test_gold_is_the_fewest_keys_with_the_mass():
    logits = torch.randn(2, 3, 20, 40, generator=torch.Generator().manual_seed(0)) * 2
    weights, chosen = logits.softmax(-1), gold(logits, "mass", 0.8)
    assert (weights.masked_fill(~chosen, 0).sum(-1) >= 0.8 - 1e-6).all()
    smallest = weights.masked_fill(~chosen, 9).amin(-1)
    assert (weights.masked_fill(~chosen, 0).sum(-1) - smallest < 0.8).all(), "one fewer is too few"
    assert (weights.masked_fill(chosen, 0).amax(-1) <= smallest).all()
    hidden = logits.masked_fill(torch.arange(40) > 30, -torch.inf)
    assert not gold(hidden, "mass", 1.0)[..., 31:].any()


def test_entmax_against_its_definition():
    """The argmax over distributions of p . z + Tsallis entropy of 1.5: gradients agree inside."""
    logits = torch.randn(6, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = entmax15(logits)
    assert p.sum(-1) == pytest.approx(1.0, abs=1e-9)
    slope = (logits - 2 * p.sqrt()).masked_fill(p == 0, torch.nan)
    level = slope.nanmean(-1, keepdim=True)
    assert (slope - level).nan_to_num(0).abs().max() < 1e-6
    assert (logits <= level + 1e-6)[p == 0].all()
    assert torch.equal(gold(logits, "entmax", 0.8), p > 0)


def test_quality_of_all_and_of_some():
    call = made(0, causal=True)
    logits = logits_of(call, torch.arange(N))
    scores, values, legal = dense(call)
    assert torch.allclose(logits.double(), scores, atol=1e-5)
    wanted = gold(logits, "mass", 0.8)
    everything = quality(logits, torch.ones_like(wanted), wanted, values.float())
    assert everything["density"] == everything["recall"] == 1.0
    assert everything["error"] < 1e-5
    half = wanted.clone()
    half[:, :, 0] = False
    lacking = quality(logits, half, wanted, values.float())
    assert lacking["recall"] == pytest.approx(1 - 1 / N), "rows count alike"
    some = quality(logits, wanted, wanted, values.float())
    assert some["recall"] == 1.0 and 0.8 <= some["mass"] < 1
    assert some["density"] == pytest.approx(float(wanted.sum() / (legal.sum() * HEADS)))


# --- Sparsefinder ----------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", ["distance", "quantization", "clustering"])
@pytest.mark.parametrize("kind", ["NS", "CS"])
def test_sparsefinder_against_the_formula(method, predictor, kind):
    ours = method("sparsefinder", kind=kind, predictor=predictor, window=5, point=3)
    call = made(7, kind[0] == "C")
    fitted, curve = ours.fitted, ours.found["curves"][predictor]
    keys = call.key.repeat_interleave(HEADS // KV, 1)
    q, k = (
        torch.einsum("bhld,hdr->bhlr", x, fitted["weight"]) + fitted["bias"][:, None]
        for x in (call.query, keys)
    )
    knob = curve[3]["knob"]
    if predictor == "distance":
        apart = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
        kept = apart < fitted["thresholds"][3][:, None, None]
    elif predictor == "clustering":
        centres = fitted[f"clusters_{knob}"][None]
        q, k = (torch.cdist(x, centres).argmin(-1) for x in (q, k))
        kept = q[..., None] == k[:, :, None]
    elif kind == "NS":  # ranks, cut into equal parts
        q, k = (x.argsort(2).argsort(2) // math.ceil(N / knob) for x in (q, k))
        kept = (q[:, :, :, None] == k[:, :, None]).any(-1)
    else:
        at = torch.linspace(0, 100, knob + 1)[1:-1].round().long()
        edges = fitted["quantiles"][..., at]
        q, k = (
            (x[..., None] > edge[None, :, None]).sum(-1)
            for x, edge in zip((q, k), edges, strict=True)
        )
        kept = (q[:, :, :, None] == k[:, :, None]).any(-1)
    place = torch.arange(N)
    kept |= (place[:, None] - place).abs() <= 2
    kept[..., 0] = kept[:, :, 0] = True
    scores, values, legal = dense(call)
    expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ values
    result = ours(call)
    assert torch.allclose(result.output.double(), expected, atol=1e-5)
    assert torch.allclose(ours.in_float64(call, result, HEADS), expected, atol=1e-10)
    share = (kept & legal).sum((2, 3)) / legal.sum((2, 3))
    assert torch.allclose(result.density.double(), share.double(), atol=1e-6)


def test_sparsefinder_that_keeps_all_is_exact(method):
    call = made(3)
    result = method("sparsefinder", window=2 * N + 1)(call)
    assert torch.allclose(result.output, call.exact(), atol=1e-5)
    assert result.density.min() == 1


def test_learning_finds_more_than_the_start():
    """Projections that were fitted keep more of the gold graph at the same density."""

    def recall(steps: int) -> float:
        fit = SparsefinderFit(steps=steps, rows=64, window=1)
        found = fit(captured(), torch.Generator().manual_seed(0)).found["curves"]["distance"]
        return sum(point["recall"] for point in found[2:6]) / 4

    assert recall(120) > recall(0) + 0.05


def test_buckets():
    tokens = torch.tensor([3.0, 1.0, 2.0, 9.0, 7.0, 8.0]).view(1, 1, 6, 1)
    assert by_rank(tokens, None, 3).flatten().tolist() == [1, 0, 0, 2, 1, 2]
    valid = torch.tensor([[True, True, True, True, False, False]])
    assert by_rank(tokens, valid, 2).flatten()[:4].tolist() == [1, 0, 0, 1]
    edges = torch.tensor([2.5, 7.5]).view(1, 1, 2)
    assert by_edges(tokens, edges).flatten().tolist() == [1, 0, 0, 2, 1, 2]


def test_k_means_finds_what_is_there():
    chance = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = truth.repeat(30, 1) + 0.1 * torch.randn(90, 2, generator=chance)
    centres = k_means(points.expand(2, -1, -1), 3, chance)
    for head in centres:
        assert torch.cdist(truth, head).amin(1).max() < 0.2


def test_pairs_do_not_look_at_masks_but_ranks_skip_padding():
    fitted = {"weight": torch.eye(2)[None], "bias": torch.zeros(1, 2)}
    tokens = torch.randn(1, 1, 6, 2, generator=torch.Generator().manual_seed(0))
    full = AttentionMask.full(6, 6)
    padded = full.with_padding(*[torch.arange(6)[None] < 4] * 2)
    first = Pairs(tokens[:, :, :4], tokens[:, :, :4], fitted, AttentionMask.full(4, 4), ranks=True)
    other = Pairs(tokens, tokens, fitted, padded, ranks=True)
    rows = torch.arange(4)
    a, b = (pairs.kept("quantization", rows, 0, 2) for pairs in (first, other))
    assert torch.equal(a, b[..., :4])


# --- the block model, TFF, Linformer ---------------------------------------------------------


def test_sbm_draws_what_its_chances_say(method):
    ours, call = method("sbm", budget=0.3), made(5)
    fitted = {name: x.double() for name, x in ours.fitted.items()}
    keys = call.key.repeat_interleave(HEADS // KV, 1)

    def members(x):
        hidden = torch.relu(
            torch.einsum("bhld,hde->bhle", x.double() * D**-0.25, fitted["w1"])
            + fitted["b1"][:, None]
        )
        placed = torch.einsum("bhle,hef->bhlf", hidden, fitted["w2"]) + fitted["b2"][:, None]
        return torch.sigmoid(torch.einsum("bhlf,hcf->bhlc", placed, fitted["clusters"]))

    between = torch.einsum("hcd,hed->hce", fitted["clusters"], fitted["clusters"])
    between = between.flatten(1).softmax(-1).view_as(between)
    chance = torch.einsum("bhnc,hce,bhme->bhnm", members(call.query), between, members(keys))
    point = min(range(10), key=lambda i: abs(ours.found["curves"]["edges"][i]["density"] - 0.3))
    chance = (chance * fitted["scales"][point][:, None, None]).clamp(max=1)
    drawn = torch.stack(
        [ours.with_settings({"seed": seed}).choose(call, _tally())["kept"] for seed in range(60)]
    )
    off = drawn.double().mean(0) - chance
    off[..., 0] = 0.0
    off[:, :, 0] = 0.0
    inner = off.masked_fill(torch.eye(N, dtype=torch.bool), 0.0)
    assert inner.abs().mean() < 0.06 and abs(float(inner.mean())) < 0.01
    assert torch.equal(ours.choose(call, _tally())["kept"], drawn[0][:])
    assert not torch.equal(drawn[0], drawn[1])
    kept = drawn[0]
    scores, values, _ = dense(call)
    expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ values
    assert torch.allclose(ours(call).output.double(), expected, atol=1e-5)
    assert float(ours(call).density.mean()) == pytest.approx(0.3, abs=0.1)


def _tally():
    from mra_cli.methods.rows import Tally

    return Tally()


@pytest.mark.parametrize("kind", ["linear", "feedforward", "oglu", "lowrank"])
@pytest.mark.parametrize("pattern", ["NS", "CS"])
def test_tff_against_the_formula(tmp_path, kind, pattern):
    fit = TffFit(kind=kind, steps=5, depth=2, accept=10.0)
    fitted = fit(captured(pattern), torch.Generator().manual_seed(0))
    ours = _written(tmp_path, fit, fitted, pattern)
    call = made(11, pattern[0] == "C")
    keys = call.key.repeat_interleave(HEADS // KV, 1)
    features = []
    for side, tokens in (("q", call.query), ("k", keys)):
        one = {n[2:]: x.double() for n, x in fitted.tensors.items() if n[0] == side}
        x = tokens.double() * D**-0.25
        if kind == "feedforward":
            x = torch.nn.functional.gelu(x @ one["w0"] + one["b0"][:, None])
            x = torch.log1p(torch.exp(2.5 * (x @ one["w1"] + one["b1"][:, None]))) / 2.5
        else:
            for layer in range(1 if kind == "linear" else 2):
                gate = one.get(f"g{layer}")
                if kind == "lowrank":
                    gate = one[f"ga{layer}"] @ one[f"gb{layer}"]
                last = layer == (0 if kind == "linear" else 1)
                out = x @ one[f"w{layer}"]
                out = torch.log1p(torch.exp(out)) if last else out
                x = out if gate is None else out / (1 + torch.exp(-(x @ gate)))
        features.append(x)
    _, values, legal = dense(call)
    weights = (features[0] @ features[1].transpose(2, 3)) * legal
    expected = weights / weights.sum(-1, keepdim=True) @ values
    result = ours(call)
    assert torch.allclose(result.output.double(), expected, atol=1e-5)
    assert torch.allclose(ours.in_float64(call, result, HEADS), expected, atol=1e-9)
    assert result.density.max() == 0


def test_tff_leaves_heads_exact_that_it_does_not_fit(tmp_path):
    fit = TffFit(steps=20)
    fitted = fit(captured(), torch.Generator().manual_seed(0))
    errors = sorted(fitted.found["error_by_head"])
    ours = _written(tmp_path, fit, fitted, "NS").with_settings({"accept": errors[1]})
    assert sum(ours.accepted) == 2
    call = made(2)
    result, exact = ours(call), call.exact()
    rejected = [head for head, taken in enumerate(ours.accepted) if not taken]
    assert torch.allclose(result.output[:, rejected], exact[:, rejected], atol=1e-5)
    off = relative_error(result.output, exact, call.valid_rows)[0]
    assert (off[ours.accepted] > 0.01).all()
    assert result.density[0].tolist() == [0.0 if taken else 1.0 for taken in ours.accepted]
    nothing = ours.with_settings({"accept": 0.0})
    assert "no head of site can be fitted" in nothing.reason_for_exact(call)


def test_tff_learns_what_has_low_rank():
    """Tokens of three kinds that attend to their own kind."""

    def call(seed: int) -> AttentionCall:
        chance = torch.Generator().manual_seed(seed)
        kinds = torch.eye(D)[torch.randint(3, (1, 1, N), generator=chance)] * 4
        tokens = kinds + 0.1 * torch.randn(1, HEADS, N, D, generator=chance)
        values = kinds.flip(-1) + torch.randn(1, KV, N, D, generator=chance)
        mask = AttentionMask.full(N, N)
        return AttentionCall(tokens, tokens[:, ::2], values, mask, D**-0.5)

    samples = dataclasses.replace(captured(), train=[call(0), call(1)], held_out=[call(2)])
    found = TffFit(steps=150, accept=0.2)(samples, torch.Generator().manual_seed(0)).found
    assert found["error_before"] > 0.5 and found["error_of_mean"] > 0.5
    assert found["error"] < 0.2
    assert found["accepted"] == sum(error <= 0.2 for error in found["error_by_head"]) > 0


def test_orthogonality_is_kept_by_its_penalty():
    def apart(weight: float) -> float:
        fit = TffFit(steps=60, rate=0.05, orthogonality=weight)
        w = fit(captured(), torch.Generator().manual_seed(0)).tensors["q.w0"]
        return float((w @ w.transpose(1, 2) - torch.eye(D)).square().mean())

    assert apart(100.0) < 0.5 * apart(0.0)


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_linformer_against_the_formula(method, budget):
    ours, call = method("linformer", budget), made(4)
    rank = 16 if budget == 0.1 else 48
    e, f = (ours.fitted[f"{name}_{rank}"].double() for name in ("keys", "values"))
    _, values, _ = dense(call)
    keys = call.key.double().repeat_interleave(HEADS // KV, 1)
    logits = D**-0.5 * call.query.double() @ (e @ keys).transpose(2, 3)
    expected = logits.softmax(-1) @ (f @ values)
    result = ours(call)
    assert torch.allclose(result.output.double(), expected, atol=1e-5)
    assert torch.allclose(ours.in_float64(call, result, HEADS), expected, atol=1e-10)
    shorter = dataclasses.replace(call, key=call.key[:, :, :64], value=call.value[:, :, :64])
    shorter = dataclasses.replace(shorter, mask=AttentionMask.full(N, 64))
    assert "fitted for 96 keys, and got 64" in ours.reason_for_exact(shorter)
    assert "padding" in ours.reason_for_exact(made(1, batch=2, lengths=[96, 70]))


def test_linformer_of_full_rank_is_exact_from_the_start():
    assert torch.equal(run_means(10, 10), torch.eye(10))
    means = run_means(10, 3)
    assert torch.allclose(means.sum(1), torch.ones(3)) and (means > 0).sum(0).tolist() == [1] * 10
    found = LinformerFit(ranks=(N,), steps=0)(captured(), torch.Generator()).found
    assert found["error"] < 1e-5


@pytest.mark.parametrize("name", ["sparsefinder", "sbm", "tff"])
def test_ragged_lengths(method, name):
    """Each sequence of a padded batch as it comes out alone."""
    ours = method(name, **({"predictor": "distance"} if name == "sparsefinder" else {}))
    lengths = [96, 70]
    both = made(8, batch=2, lengths=lengths)
    output = ours(both).output
    for at, length in enumerate(lengths):
        parts = [x[at : at + 1, :, :length] for x in (both.query, both.key, both.value)]
        alone = AttentionCall(*parts, AttentionMask.full(length, length), both.scaling)
        assert torch.allclose(output[at, :, :length], ours(alone).output[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("sparsefinder", {"predictor": p}) for p in ("distance", "quantization", "clustering")),
        ("sbm", {}),
        ("tff", {}),
    ],
)
def test_a_prefix_gives_what_the_whole_gives(method, name, settings):
    """Causal: what comes later must not matter, not even for which pairs are kept."""
    ours, whole = method(name, kind="CS", **settings), made(6, causal=True)
    output, length = ours(whole).output, 80
    parts = [x[:, :, :length] for x in (whole.query, whole.key, whole.value)]
    prefix = AttentionCall(*parts, AttentionMask.causal(length), whole.scaling)
    assert torch.allclose(ours(prefix).output, output[:, :, :length], atol=1e-5)


def test_the_band():
    keep = band(3, 1, 2)(torch.arange(3)[:, None], torch.arange(6))
    assert keep.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]


def test_descending_stops_at_the_bottom():
    x = torch.tensor([5.0])
    descend([x], lambda step: (x - 2).square().sum(), steps=400, rate=0.05)
    assert x.item() == pytest.approx(2.0, abs=1e-2) and not x.requires_grad


# --- files -----------------------------------------------------------------------------------


def _written(folder, fit, fitted, kind):
    header = {
        "schema": 1,
        "method": fit.method,
        "model": "made up",
        "fingerprint": "sha256:0",
        "length": N,
        "options": dataclasses.asdict(fit),
        "sites": {"site": {"kind": kind, **fitted.found}},
    }
    tensors = {f"site|{name}": x.contiguous() for name, x in fitted.tensors.items()}
    path = folder / "it.safetensors"
    path.write_bytes(module.save(tensors, metadata={module.CALIBRATION_KEY: json.dumps(header)}))
    return make_method(fit.method, 0.25, {"calibration": str(path)}).at("site")


@pytest.fixture
def checkpoint(bert):
    from mra_cli.checkpoint import load_checkpoint

    return load_checkpoint(str(bert))


@pytest.mark.parametrize("name", list(QUICK))
def test_the_same_seed_gives_the_same_bytes(checkpoint, tmp_path, name):
    samples = make_samples(checkpoint, seq_len=96, count=3)
    fit = make_fit(name, {**QUICK[name], "steps": 6})
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        calibrate(checkpoint, samples, fit, path, seed=seed)
    a, b, c = (path.read_bytes() for path in paths)
    assert a == b
    if name != "linformer":  # nothing in it is random
        assert load_file(paths[0]).keys() == load_file(paths[2]).keys() and a != c
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{p}{end}" for p in "abc" for end in ("", ".json")
    )
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["sites"] == read_calibration(str(paths[0])).sites


def test_interrupted_and_resumed_gives_the_same_bytes(checkpoint, tmp_path, monkeypatch):
    samples = make_samples(checkpoint, seq_len=96, count=2)
    fit = make_fit("tff", {"steps": 6})
    whole = calibrate(checkpoint, samples, fit, tmp_path / "whole")
    assert whole.resumed == 0
    save, saved = module._save, []

    def dying(file, fitted):
        if saved:
            raise KeyboardInterrupt
        saved.append(file)
        save(file, fitted)

    monkeypatch.setattr(module, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, samples, fit, tmp_path / "it")
    monkeypatch.undo()
    assert not (tmp_path / "it").exists()
    other = calibrate(checkpoint, samples, make_fit("tff", {"steps": 7}), tmp_path / "other")
    assert other.resumed == 0
    resumed = calibrate(checkpoint, samples, fit, tmp_path / "it")
    assert resumed.resumed == 1
    for end in ("", ".json"):
        again = (tmp_path / f"it{end}").read_bytes()
        assert again == (tmp_path / f"whole{end}").read_bytes()
        assert again != (tmp_path / f"other{end}").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_another_job_does_not_resume(checkpoint, tmp_path, monkeypatch):
    samples = make_samples(checkpoint, seq_len=96, count=2)
    real = module._write

    def dying(path, content):
        if path == tmp_path / "it":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(module, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, samples, make_fit("tff", {"steps": 6}), tmp_path / "it")
    monkeypatch.undo()
    assert (tmp_path / ".it.sites").is_dir()
    done = calibrate(checkpoint, samples, make_fit("tff", {"steps": 3}), tmp_path / "it")
    assert done.resumed == 0


def test_killed_and_resumed(checkpoint, tmp_path):
    """A process that dies without a chance to tidy up. A fork spares the seconds of imports."""
    samples = make_samples(checkpoint, seq_len=96, count=2)
    fit = make_fit("tff", {"steps": 100})
    calibrate(checkpoint, samples, fit, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        try:
            calibrate(checkpoint, samples, fit, tmp_path / "it")
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".it.sites").glob("*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and not (tmp_path / "it").exists()
    again = calibrate(checkpoint, samples, fit, tmp_path / "it")
    assert again.resumed == 1
    for end in ("", ".json"):
        bytes_of_both = [(tmp_path / f"{name}{end}").read_bytes() for name in ("it", "whole")]
        assert bytes_of_both[0] == bytes_of_both[1]


def test_another_model_s_calibration_is_refused(cli, refuses, saved, checkpoint, text, tmp_path):
    path = tmp_path / "it"
    samples = make_samples(checkpoint, seq_len=96, count=2)
    calibrate(checkpoint, samples, make_fit("sparsefinder", {"steps": 2}), path)
    method = make_method("sparsefinder", 0.3, {"calibration": str(path)})
    check_model(method, checkpoint.fingerprint)
    with pytest.raises(InputError, match="was fitted to"):
        check_model(method, "sha256:another")
    options = ("--set", f"calibration={path}", "--text", text, "--seq-len", "96")
    says = ["was fitted to", "calibrate it, too"]
    refuses("analyze", saved("electra"), "--method", "sparsefinder", *options, says=says)
    says = ["must be one of tff", "is of sparsefinder", "use --method sparsefinder"]
    refuses("analyze", saved("bert"), "--method", "tff", *options, says=says)
    ran = cli(
        *("analyze", saved("bert"), "--method", "sparsefinder", *options),
        *("--samples", "1", "--budget", "0.3"),
    )
    assert ran.code == 0, ran


def test_a_calibration_is_asked_for(refuses, bert, text):
    says = ["sbm has to be fitted", "mra-cli calibrate MODEL --method sbm --out FILE"]
    refuses("analyze", bert, "--method", "sbm", "--text", text, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["can't read the calibration", "mra-cli calibrate"]),
        (b"no", ["must be a calibration"]),
    ],
)
def test_no_calibration_at_all(refuses, bert, text, tmp_path, content, says):
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    options = ("--method", "tff", "--set", f"calibration={path}", "--text", text)
    refuses("analyze", bert, *options, says=says)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--method", "mra"), 1, ["must be one that is calibrated", "sparsefinder", "got 'mra'"]),
        (("--method", "tff", "--set", "depht=2"), 1, ["settings kind, depth", "got 'depht'"]),
        (("--method", "tff", "--set", "kind=cubic"), 1, ["kind must be one of linear"]),
        (("--method", "tff", "--set", "steps=0"), 1, ["steps must be over 0, got 0"]),
        (("--method", "tff", "--samples", "1"), 2, ["--samples"]),
        (("--method", "linformer", "--set", "ranks=900"), 1, ["at most the length 96, got 900"]),
    ],
)
def test_refused(refuses, bert, text, tmp_path, arguments, code, says):
    out = tmp_path / "it"
    common = ("--text", text, "--seq-len", "96", "--out", out)
    refuses("calibrate", bert, *common, *arguments, code=code, says=says)
    assert not out.exists()


def test_where_nothing_can_be_written(refuses, bert):
    refuses("calibrate", bert, "--method", "tff", "--out", "/no/where", code=2, says=["--out"])


def test_causal_sites_are_not_for_linformer(refuses, saved, text, tmp_path):
    says = ["linformer serves NS, NC attention", "are CS", "choose another"]
    options = ("--method", "linformer", "--text", text, "--seq-len", "96", "--out", tmp_path / "x")
    refuses("calibrate", saved("llama-gqa"), *options, says=says)


# --- real models -----------------------------------------------------------------------------


@pytest.mark.checkpoints
@pytest.mark.slow
@pytest.mark.parametrize("name", list(QUICK))
def test_minilm_with_each(minilm, tmp_path, name):
    """Fitted to two layers in seconds, then analyzed like any other method."""
    samples = make_samples(minilm, seq_len=256, count=3)
    fit = make_fit(name, {"ranks": (26, 64, 128)} if name == "linformer" else {"steps": 60})
    path = tmp_path / "it"
    calibrate(minilm, samples, fit, path, layers="2,5")
    method = make_method(name, 0.25, {"calibration": str(path)})
    fresh = make_samples(minilm, seq_len=256, count=1, seed=5)
    found = analyze(minilm, fresh, method, [0.5], layers="2,5")
    errors = [row.error for row in found.by_site]
    assert found.method["calibration"] == str(path) and all(0 < e < 0.8 for e in errors), errors
    if name in ("sparsefinder", "sbm"):
        assert all(row.density == pytest.approx(0.5, abs=0.1) for row in found.by_site)


@pytest.mark.checkpoints
@pytest.mark.slow
def test_tff_s_gain_on_minilm(minilm, tmp_path):
    """The design notes have .82 to .65 and .71 to .42 for layers 2 and 5: 21 % and 41 % less."""
    samples = make_samples(minilm, seq_len=512, count=3)
    fit = make_fit("tff", {"kind": "linear"})
    sites = calibrate(minilm, samples, fit, tmp_path / "it", layers="2,5").header["sites"]
    gains = [1 - found["error"] / found["error_before"] for found in sites.values()]
    assert gains[0] == pytest.approx(0.21, abs=0.07) and gains[1] == pytest.approx(0.41, abs=0.07)


@pytest.mark.parametrize("name", ["sparsefinder", "sbm", "tff"])
def test_causal_models(name, tmp_path, saved):
    from mra_cli.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(saved("llama-gqa")))
    samples = make_samples(checkpoint, seq_len=96, count=2)
    calibrate(checkpoint, samples, make_fit(name, QUICK[name]), tmp_path / "it")
    method = make_method(name, 0.25, {"calibration": str(tmp_path / "it")})
    found = analyze(checkpoint, samples, method, [0.3])
    assert all(0 < row.error < 1.5 for row in found.by_site)


def test_what_is_captured_is_what_the_model_computes(checkpoint):
    samples = make_samples(checkpoint, seq_len=96, count=4)
    sites = module.find_sites(checkpoint.model, module.probe(samples))
    found = module._captured(checkpoint, samples, sites)
    assert [(len(c.train), len(c.held_out)) for c in found.values()] == [(3, 1)] * len(sites)
    seen = []

    def record(site, call):
        seen.append(call.query)
        return call.exact()

    with torch.no_grad(), intercepted(checkpoint.model, {s.name: s for s in sites}, record):
        checkpoint.model(**samples.batches[0])
    assert torch.equal(found[sites[0].name].train[0].query, seen[0])
    assert [len(group) for group in module._groups(sites, samples)] == [len(sites)]


def test_every_architecture_s_sites_have_a_kind_that_is_served():
    kinds = set(SparsefinderFit.kinds) & set(TffFit.kinds) & set(SbmFit.kinds)
    assert kinds == {"NS", "CS", "NC", "CC"}
    assert len(ARCHITECTURES) > 80
    assert kernel(torch.zeros(1, 1, 1, 2), {"w0": torch.eye(2)[None]}, "linear").min() > 0
