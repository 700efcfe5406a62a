"""`bench MODEL`: a whole model, original against patched, on tiny ones of every kind."""

from __future__ import annotations

import json

import pytest
import torch

from architectures import ARCHITECTURES
from mra_cli.bench.model import ModelSetup, _run, decodes, run_model_bench, too_long
from mra_cli.bench.plots import draw
from mra_cli.bench.report import BenchReport
from mra_cli.checkpoint import Checkpoint, load_checkpoint
from mra_cli.errors import InputError
from mra_cli.methods import make_method, with_impl


def build(name):
    return next(a for a in ARCHITECTURES if a.name == name).build()


def setup(*lengths, **rest):
    rest = {"pairs": 1, "new_tokens": 3, **rest}
    return ModelSetup(tuple(lengths), (make_method("mra", 0.5),), **rest)


def test_a_model_that_generates(saved):
    found = run_model_bench(load_checkpoint(str(saved("llama-gqa"))), setup(80, 100, 200))
    assert [row.n_tokens for row in found.model_rows] == [80, 100]
    assert [(r.n_keys, r.reason.split()[-2:]) for r in found.refused] == [
        (200, ["128", "positions"])
    ]
    for row in found.model_rows:
        assert row.exact_first_ms >= row.exact_prefill_ms > 0
        assert row.method_first_ms >= row.method_prefill_ms > 0
        assert row.exact_tokens_per_s > 0 and row.method_tokens_per_s > 0
        assert row.speedup == pytest.approx(row.exact_prefill_ms / row.method_prefill_ms)
        assert row.harm.startswith("ppl ") and row.sites == 2
    assert BenchReport.from_json(found.to_json()) == found
    assert found.to_csv().splitlines()[0].startswith("n_tokens,method,budget")
    assert len(found.trends) == 1 and found.trends[0].pattern == "model"


@pytest.mark.parametrize(("name", "harm"), [("bert", "embedding cosine"), ("t5", "embedding|ppl")])
def test_models_without_decoding_are_timed_forward(saved, name, harm):
    found = run_model_bench(load_checkpoint(str(saved(name))), setup(100))
    (row,) = found.model_rows
    assert row.exact_prefill_ms > 0 and row.exact_first_ms is row.exact_tokens_per_s is None
    assert any(row.harm.startswith(part) for part in harm.split("|"))
    assert any("forward pass alone" in note for note in found.notes)
    assert BenchReport.from_json(found.to_json()) == found


def test_pictures_have_no_length_to_choose(saved):
    checkpoint = load_checkpoint(str(saved("vit")))
    (row,) = run_model_bench(checkpoint, setup(None)).model_rows
    assert row.n_tokens == 82, "patches and a class token"
    with pytest.raises(InputError, match="take text"):
        run_model_bench(checkpoint, setup(64))


def test_decoding_takes_the_steps_of_generate():
    """The tokens of transformers' own greedy search, or the times would be of something else."""
    model = build("llama-gqa")
    ids = torch.arange(10, 60)[None]
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    fed = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: fed.append(args[0])
    )
    with torch.no_grad():
        run = _run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3)
    hook.remove()
    assert torch.equal(torch.cat(fed, 1), expected[:, : 50 + 3])
    assert run.first_ms >= run.prefill_ms > 0 and run.ms_per_token > 0


def test_learned_positions_run_out_and_rotary_ones_do_not():
    gpt2, llama = build("gpt2"), build("llama-gqa")
    assert decodes(gpt2, 128) and not decodes(gpt2, 129)
    assert decodes(llama, 10_000)
    assert not decodes(build("bert"), 10) and not decodes(build("t5"), 10)


def test_lengths_that_do_not_fit_are_known_before(saved):
    checkpoint = load_checkpoint(str(saved("bert")))
    assert list(too_long(checkpoint, setup(64, 128, 129))) == [129]
    with pytest.raises(InputError, match=r"nothing to run: .* 128 positions; .*--seq-len"):
        run_model_bench(checkpoint, setup(300))


def test_an_implementation_that_cannot_serve_is_refused():
    model = build("llama-gqa").double()
    checkpoint = Checkpoint("tiny", model, None, None, "none")
    from mra_cli.bench.model import sites_to_patch

    method = with_impl(make_method("mra", 0.5), "reference")
    assert len(sites_to_patch(checkpoint, ModelSetup((64,), (method,)))) == 2
    try:
        native = with_impl(make_method("mra", 0.5), "native")
    except InputError:
        pytest.skip("no compiler")
    with pytest.raises(InputError, match="float64 was given; leave it out"):
        sites_to_patch(checkpoint, ModelSetup((64,), (native,)))


def test_the_command(cli, saved, tmp_path):
    pytest.importorskip("matplotlib")
    line = "--seq-len 80,120 --budget 0.5 --pairs 1 --new-tokens 2 --layers 1 --json"
    files = (tmp_path / "it.json", "--plot", tmp_path / "it.svg")
    ran = cli("bench", saved("llama-gqa"), *line.split(), *files)
    assert ran.code == 0, ran
    for text in ("Whole model", "prefill ms", "first token ms", "tokens/s", "peak MiB", "ppl"):
        assert text in ran.out
    assert "1 sites approximated" in ran.out
    report = BenchReport.from_json((tmp_path / "it.json").read_text())
    assert draw(report, "svg").decode() == (tmp_path / "it.svg").read_text()


def test_a_dry_run_names_what_would_not_run(cli, saved):
    ran = cli("bench", saved("bert"), "--dry-run", "--seq-len", "100,200", "--json", "-")
    assert ran.code == 0, ran
    found = json.loads(ran.out)
    refused = {run["length"]: run["refused"] for run in found["runs"]}
    assert refused[100] is None and "128 positions" in refused[200]
    assert "2 sites approximated" in found["subject"]
