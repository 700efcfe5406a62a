"""Calibrated methods against independent formulas, and their fits against what they look for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from calibrated_cases import HEADS, KV, QUICK, D, N, captured, made, write_calibration
from mra_cli.calibrate.calibrate import make_fit
from mra_cli.calibrate.fits import descend
from mra_cli.calibrate.gold import entmax15, gold, logits_of, quality
from mra_cli.calibrate.linformer import LinformerFit, run_means
from mra_cli.calibrate.sparsefinder import SparsefinderFit, k_means
from mra_cli.calibrate.tff import TffFit
from mra_cli.calls import AttentionCall
from mra_cli.measure import relative_error
from mra_cli.methods import make_method
from mra_cli.methods.calibration import band
from mra_cli.methods.sparsefinder import Pairs, by_edges, by_rank
from mra_kernels import AttentionMask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A calibration of each method, of made-up calls, by method and kind of site."""
    folder, written = tmp_path_factory.mktemp("calibrations"), {}

    def file(name: str, kind: str = "NS"):
        if (name, kind) not in written:
            fit = make_fit(name, QUICK[name])
            fitted = fit(captured(kind), torch.Generator().manual_seed(0))
            path = folder / f"{name}-{kind}.safetensors"
            write_calibration(path, fit, fitted, kind)
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


def one_site(folder, fit, fitted, kind):
    """The method of a calibration just written."""
    write_calibration(folder / "it.safetensors", fit, fitted, kind)
    options = {"calibration": str(folder / "it.safetensors")}
    return make_method(fit.method, 0.25, options).at("site")


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
    ours = one_site(tmp_path, fit, fitted, pattern)
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
    ours = one_site(tmp_path, fit, fitted, "NS").with_settings({"accept": errors[1]})
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
