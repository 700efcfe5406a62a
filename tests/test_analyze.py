"""`analyze` as a function and as a command: what it measures, says and writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

from architectures import ARCHITECTURES
from cli_support import python
from mra_cli.analyze import _listed, _verdict, analyze, choose_sites
from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError, UnsupportedModelError
from mra_cli.evaluate import Damage, Judge
from mra_cli.inputs import Samples, default_text, dry_run, make_samples, probe
from mra_cli.measure import (
    captured_mass,
    paired_latency_ms,
    relative_error,
    with_peak_bytes,
)
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.report import AnalyzeReport
from mra_cli.sites import find_sites


def tiny(name: str) -> Checkpoint:
    model = next(a for a in ARCHITECTURES if a.name == name).build()
    return Checkpoint(name, model, None, None, "none")


@pytest.fixture(scope="module")
def report(minilm) -> AnalyzeReport:
    samples = make_samples(minilm, seq_len=256, count=2)
    return analyze(minilm, samples, make_method("mra", 0.1), [0.25, 0.5, 1.0])


@pytest.mark.checkpoints
def test_figures_of_a_report_hang_together(report):
    assert len(report.by_site) == 6 * 3
    assert [figures.budget for figures in report.by_budget] == [0.25, 0.5, 1.0]
    for row in report.by_site:
        assert row.density <= row.budget + row.forced
        assert row.density - 1e-6 <= row.mass <= 1 + 1e-6, "selected scores are the larger ones"
        assert row.error == pytest.approx(sum(row.error_by_head) / 12)
        assert row.exact_ms > 0 and row.method_ms > 0
        assert row.exact_bytes >= 12 * 256 * 32 * 4
    by_budget = report.by_budget
    assert by_budget[0].error > by_budget[1].error > by_budget[2].error
    assert by_budget[2].error < 2e-6
    assert by_budget[2].damage.cosine_min == pytest.approx(1.0, abs=1e-6)
    assert by_budget[2].verdict == "yes"
    assert by_budget[0].damage.cosine_mean < by_budget[1].damage.cosine_mean < 1
    assert report.peak_process_bytes > 100 << 20


@pytest.mark.checkpoints
def test_a_report_survives_json(report):
    assert AnalyzeReport.from_json(report.to_json()) == report
    data = json.loads(report.to_json())
    origin = data["provenance"]
    assert data["schema"] == 1
    assert origin["model_fingerprint"].startswith("sha256:")
    assert origin["inputs_digest"].startswith("sha256:")
    for key in ("command", "torch", "transformers", "threads", "machine", "seed", "date"):
        assert origin[key] not in (None, "")
    for text in ("{}", "[", '{"schema": 7}'):
        with pytest.raises(InputError):
            AnalyzeReport.from_json(text)


@pytest.mark.checkpoints
def test_the_same_seed_gives_the_same_figures(minilm):
    def run(seed: int) -> list[float]:
        samples = make_samples(minilm, seq_len=128, count=1, seed=seed)
        found = analyze(minilm, samples, make_method("mra2", 0.25), [0.25])
        return [row.error for row in found.by_site]

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.checkpoints
def test_student_forced_damage_is_that_of_the_patched_model(minilm):
    """The damage a report states is what somebody who patches the model gets."""
    samples = make_samples(minilm, seq_len=128, count=2)
    method = make_method("mra2", 0.25)
    found = analyze(minilm, samples, method, [0.25], layers="1-2")
    assert {row.site for row in found.by_site} == {
        "encoder.layer.1.attention.self",
        "encoder.layer.2.attention.self",
    }
    judge = Judge(minilm.model, samples.batches, minilm.tokenizer)
    sites = choose_sites(find_sites(minilm.model, probe(samples)), "1-2")
    with patched(minilm.model, Plan.uniform(sites, method)):
        assert judge.judge() == found.by_budget[0].damage


@pytest.mark.parametrize("name", ["vit", "dinov2", "whisper", "ast", "clip", "beit"])
def test_models_that_take_no_text_get_synthetic_inputs_and_say_so(name):
    checkpoint = tiny(name)
    if name == "clip":
        with pytest.raises(InputError, match="must have a tokenizer"):
            make_samples(checkpoint)
        return
    samples = make_samples(checkpoint, count=2)
    assert samples.synthetic
    method = make_method("mra3", 0.3, {"resolutions": (8, 4, 1)})
    found = analyze(checkpoint, samples, method, [0.3])
    assert found.provenance.inputs_synthetic
    assert "synthetic" in found.by_budget[0].summary
    assert 0 < found.by_budget[0].error < 1


def test_encoder_decoders_are_judged_by_the_decoder_s_loss():
    checkpoint = tiny("bart")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(10, 90, (1, 120), generator=generator),
        "decoder_input_ids": torch.randint(10, 90, (1, 80), generator=generator),
    }
    samples = Samples([batch], "random tokens", "none", 120)
    method = make_method("mra2", 0.3, {"resolutions": (8, 1)})
    found = analyze(checkpoint, samples, method, [0.3, 1.0])
    assert {site.kind for site in found.sites} == {"NS", "CS", "CC"}
    low, full = (figures.damage for figures in found.by_budget)
    assert full.loss == pytest.approx(full.loss_exact, rel=1e-5)
    assert low.kl > full.kl


@pytest.mark.checkpoints
def test_samples_say_what_was_not_as_asked(minilm):
    text = default_text()[:9000]
    samples = make_samples(minilm, text=text, text_name="mine", seq_len=512, count=50)
    fitting = len(samples.batches)
    assert 1 <= fitting < 50
    assert samples.source == f"mine (only {fitting} of 50 samples fit)"


def test_windows_that_demand_more_than_the_budget_are_named():
    checkpoint = tiny("mistral")
    ids = torch.randint(10, 90, (1, 120), generator=torch.Generator().manual_seed(0))
    samples = Samples([{"input_ids": ids}], "random tokens", "none", 120)
    with pytest.raises(UnsupportedModelError, match="sees at most 16 keys"):
        analyze(checkpoint, samples, make_method("mra2", 0.1), [0.1])


def test_too_short_inputs_are_refused():
    checkpoint = tiny("bert")
    ids = torch.randint(10, 90, (1, 20), generator=torch.Generator().manual_seed(0))
    samples = Samples([{"input_ids": ids}], "random tokens", "none", 20)
    with pytest.raises(UnsupportedModelError, match="20 keys"):
        analyze(checkpoint, samples, make_method("mra2", 0.1), [0.1])


@pytest.mark.parametrize("name", ["vit", "whisper", "bart", "llama-gqa"])
def test_dry_runs_need_no_inputs_of_the_user(name):
    checkpoint = tiny(name)
    assert find_sites(checkpoint.model, dry_run(checkpoint))


def classifier(classes: int) -> Checkpoint:
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=classes,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Checkpoint("classifier", model, None, None, "none")


@pytest.mark.parametrize(("classes", "words"), [(1, "output moves by"), (5, "most likely class")])
def test_heads_are_judged_by_what_they_put_out(classes, words):
    """One score has no classes: a softmax over it would be the same whatever happens."""
    checkpoint = classifier(classes)
    ids = torch.randint(10, 90, (1, 120), generator=torch.Generator().manual_seed(0))
    samples = Samples([{"input_ids": ids}], "random tokens", "none", 120)
    method = make_method("mra2s", 0.05, {"resolutions": (8, 1)})
    found = analyze(checkpoint, samples, method, [0.05, 1.0])
    low, full = found.by_budget
    assert words in low.summary
    if classes == 1:
        assert low.damage.top1_agreement is None
        assert low.damage.output_change > 0.01 > 1e-4 > full.damage.output_change
        assert low.verdict != "yes"
    else:
        assert low.damage.kl > full.damage.kl
    assert full.verdict == "yes"


def test_a_loss_that_falls_is_no_pass():
    """Damage can lower the loss by luck; the divergence from the exact model still counts."""
    lucky = Damage(loss=2.0, loss_exact=2.1, kl=0.5, top1_agreement=0.2)
    assert _verdict(lucky)[0] == "no"
    assert _verdict(Damage(loss=2.001, loss_exact=2.0, kl=0.002, top1_agreement=0.99))[0] == "yes"
    assert (
        _verdict(Damage(loss=2.03, loss_exact=2.0, kl=0.02, top1_agreement=0.9))[0] == "with care"
    )


def test_site_numbers_are_listed_as_ranges():
    assert _listed([]) == "none"
    assert _listed([3]) == "site 3"
    assert _listed([0, 2, 3, 4, 9]) == "sites 0, 2-4, 9"


def test_pure_measures():
    exact = torch.ones(1, 2, 3, 4)
    output = exact.clone()
    output[0, 1, 0] = 2.0  # head 1: one row of three off by its own length
    output[0, 0, 2] = 99.0  # padding
    valid = torch.tensor([[True, True, False]])
    error = relative_error(output, exact, valid)[0]
    assert error.tolist() == pytest.approx([0.0, 2**-0.5])
    lse = torch.log(torch.tensor([[[0.5, 0.25, 7.0]]]))
    mass = captured_mass(lse, torch.zeros(1, 1, 3), valid)
    assert float(mass) == pytest.approx(0.375)


def test_peak_bytes_count_what_is_alive_at_once():
    mib = 1 << 20

    def work():
        a = torch.zeros(mib, dtype=torch.uint8) + 1
        del a
        b = torch.zeros(2 * mib, dtype=torch.uint8)
        c = b[:mib]  # a view costs nothing
        return c + 1

    result, peak = with_peak_bytes(work, torch.device("cpu"))
    assert result.numel() == mib
    assert peak == 3 * mib


def test_latencies_are_paired():
    order = []
    first, second = paired_latency_ms(lambda: order.append("a"), lambda: order.append("b"))
    assert order == ["a", "b"] * 3
    assert 0 <= first < 50 and 0 <= second < 50


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mra_cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.checkpoints
def test_the_command_prints_tables_and_verdicts(tmp_path, minilm):
    target = tmp_path / "report.json"
    done = run(
        "analyze", "--seq-len", "128", "--samples", "1", "--budget", "0.25", "--json", str(target)
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "encoder.layer.5.attention.self",
        "budget 0.25",
        "embedding cosine",
        "Budget 0.25.",
    ):
        assert part in done.stdout
    assert "GiB" in done.stdout
    assert "wrote" in done.stderr
    saved = AnalyzeReport.from_json(target.read_text())
    assert saved.provenance.command.startswith("mra-cli analyze --seq-len 128")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.checkpoints
def test_json_on_stdout_is_alone(minilm):
    done = run("analyze", "--seq-len", "128", "--samples", "1", "--budget", "0.5", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert AnalyzeReport.from_json(done.stdout).by_budget[0].budget == 0.5
    listed = run("check", "--json", "-")
    assert len(json.loads(listed.stdout)["sites"]) == 6
    assert listed.stderr == ""


def test_memory_is_that_of_this_process():
    """Not of its parent, which getrusage counts, too."""
    held = bytearray(1 << 30)
    held[::4096] = b"x" * (1 << 18)
    code = "from mra_cli.measure import peak_process_bytes; print(peak_process_bytes())"
    done = subprocess.run(**python("-c", code), capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(held)
