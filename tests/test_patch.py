"""Patched checkpoints load patched: by transformers alone, with us beside it, and by `load`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

import mra_cli
from architectures import ARCHITECTURES
from mra_cli import export, fresh
from mra_cli.checkpoint import load_checkpoint
from mra_cli.errors import InputError, UnsupportedModelError
from mra_cli.inputs import make_samples
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.prepare import figures_of, prepare
from mra_cli.sites import find_sites, output_tensors

TWELVE_AND_MORE = [
    *("bert", "albert", "modernbert", "gpt2", "llama-gqa", "mistral", "gemma3-text", "gpt-oss"),
    *("mixtral", "t5", "bart", "whisper", "vit", "dinov2", "clip", "llava", "gemma3-vlm"),
]
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
REFUSED_BY_OLDER = {"modernbert", "t5"}  # their attention reached the interface later
UNKNOWN_TO_OLDER = {"gemma3-vlm"}  # its tiny configuration has fields that came later
TRUST = {"trust_remote_code": True}


def prepared_for(path: Path, plan: Plan) -> export.Prepared:
    return prepare(str(path), method=make_method("mra", 0.25), plan=plan)


def auto_class_of(path: Path) -> str:
    """The Auto class that makes the class a directory was saved from."""
    config = json.loads((path / "config.json").read_text())
    wanted = f"modeling_mra.{config['architectures'][0]}"
    return next(auto for auto, name in config["auto_map"].items() if name == wanted)


def equal(answers, expected) -> bool:
    assert not isinstance(answers, str), answers
    assert len(answers) == len(expected) > 0
    return all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))


@dataclasses.dataclass
class Exported:
    """A tiny model, patched on disk, and what it answers patched in memory."""

    path: Path
    inputs: dict
    approximated: list[torch.Tensor]
    reference: list[torch.Tensor]
    exact: list[torch.Tensor]

    def run(self, **options) -> fresh.Run:
        return fresh.Run(self.path, auto_class_of(self.path), self.inputs, options)


@pytest.fixture(scope="module")
@torch.no_grad()
def tiny(tmp_path_factory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("patched")
    found = {}
    for name in TWELVE_AND_MORE:
        architecture = BY_NAME[name]
        if OLDER and name in UNKNOWN_TO_OLDER:
            continue
        model, inputs = architecture.build(), architecture.inputs()
        exact = output_tensors(model(**inputs))
        try:
            sites = [
                dataclasses.replace(site, verdict="patch")  # all are small here
                for site in find_sites(model, inputs)
            ]
        except UnsupportedModelError:
            assert name in REFUSED_BY_OLDER and OLDER, name
            continue
        plan = Plan.uniform(sites, make_method("mra3", 0.3, {"resolutions": (8, 4, 1)}))
        with patched(model, plan):
            approximated = output_tensors(model(**inputs))
        with patched(model, plan.with_impl("reference")):
            reference = output_tensors(model(**inputs))
        source = folder / f"{name}-source"
        model.save_pretrained(source)
        prepared = prepared_for(source, plan)
        done = export.export(prepared, folder / name, None)
        found[name] = Exported(done.path, inputs, approximated, reference, exact)
    return found


@pytest.fixture(scope="module")
def minilm_patched(minilm, tmp_path_factory) -> Path:
    prepared = prepare("demo:minilm", method=make_method("mra", 0.25))
    figures, _ = figures_of(prepared, samples=1)
    return export.export(prepared, tmp_path_factory.mktemp("minilm") / "patched", figures).path


# --- round trips -----------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="alone"),
        pytest.param(True, id="with mra-cli", marks=pytest.mark.slow),
    ],
)
def reloaded(request, tiny):
    runs = {name: exported.run(**TRUST) for name, exported in tiny.items()}
    expected = {
        name: exported.approximated if request.param else exported.reference
        for name, exported in tiny.items()
    }
    return fresh.answers(runs, installed=request.param), expected


@pytest.mark.parametrize("name", TWELVE_AND_MORE)
def test_reloads_bit_identical_to_the_model_patched_in_memory(name, tiny, reloaded):
    if name not in tiny:
        pytest.skip(
            f"transformers {transformers.__version__} lacks it, or computes its attention elsewhere"
        )
    answers, expected = reloaded
    assert equal(answers[name], expected[name])
    assert not equal(answers[name], tiny[name].exact), "nothing was patched"


def test_loading_says_no_more_than_asked(tiny, tmp_path):
    """Without trust the exact model, with another implementation that one; strict says no."""
    bert = tiny["bert"]
    plan = prepare(
        str(bert.path.with_name("bert-source")), method=make_method("mra", 0.3), layers=None
    ).plan
    prepared = prepared_for(bert.path.with_name("bert-source"), plan)
    strict = export.export(prepared, tmp_path / "strict", None, strict=True).path
    at = dataclasses.replace
    told = fresh.answers(
        {
            "no trust": bert.run(),
            "sdpa": bert.run(**TRUST, attn_implementation="sdpa"),
            "eager": bert.run(**TRUST, attn_implementation="eager"),
            "strict": at(bert.run(**TRUST), path=strict),
            "strict, no trust": at(bert.run(), path=strict),
            "strict, no trust, sdpa": at(bert.run(attn_implementation="sdpa"), path=strict),
        }
    )
    assert equal(told["no trust"], bert.exact)
    assert equal(told["sdpa"], bert.exact)
    assert torch.allclose(told["eager"][0], bert.exact[0], atol=1e-4)
    assert not equal(told["strict"], bert.exact)
    assert "needs_trust_remote_code" in told["strict, no trust"]
    assert equal(told["strict, no trust, sdpa"], bert.exact)


def test_parts_of_a_composite_model_can_be_asked_to_stay_exact(tiny):
    model = mra_cli.load(tiny["llava"].path, attn_implementation={"vision_config": "sdpa"})
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation.startswith("mra_")


@pytest.mark.checkpoints
def test_every_auto_class_of_a_kind_of_model_is_patched(minilm_patched):
    autos = json.loads((minilm_patched / "config.json").read_text())["auto_map"]
    assert {"AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"} < {*autos}
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(minilm_patched, **TRUST)
        assert sum("_mra_site" in vars(module) for module in model.modules()) == 6
        assert model.config._attn_implementation.startswith("mra_")


@torch.no_grad()
def test_load_runs_no_remote_code_and_saves_what_reloads(tiny, tmp_path, monkeypatch):
    def remote(*args, **kwargs):
        raise AssertionError("remote code")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_cached_module_file", remote)
    bert = tiny["bert"]
    model = mra_cli.load(bert.path).eval()
    assert equal(output_tensors(model(**bert.inputs)), bert.approximated)
    exact = mra_cli.load(bert.path, attn_implementation="sdpa").eval()
    assert equal(output_tensors(exact(**bert.inputs)), bert.exact)
    model.set_attn_implementation("sdpa")
    assert equal(output_tensors(model(**bert.inputs)), bert.exact)
    model.save_pretrained(tmp_path / "again")
    monkeypatch.undo()
    run = dataclasses.replace(bert.run(**TRUST), path=tmp_path / "again")
    assert equal(fresh.answers({"again": run})["again"], bert.reference)


@torch.no_grad()
def test_saving_again_keeps_the_patch_and_strictness(tiny, tmp_path):
    source = tiny["bert"].path.with_name("bert-source")
    plan = prepare(str(source), method=make_method("mra2", 0.3)).plan
    path = export.export(prepared_for(source, plan), tmp_path / "a", None, strict=True).path
    model = transformers.AutoModel.from_pretrained(path, **TRUST)
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModel.from_pretrained(tmp_path / "b", **TRUST).eval()
    inputs = tiny["bert"].inputs
    assert equal(output_tensors(again(**inputs)), output_tensors(model.eval()(**inputs)))
    with pytest.raises(ValueError, match="needs_trust_remote_code"):
        transformers.AutoModel.from_pretrained(tmp_path / "b")


def test_a_part_of_the_model_is_patched_and_says_what_it_lacks(tiny):
    if "t5" not in tiny:
        pytest.skip("no T5 here")
    with pytest.warns(UserWarning, match="T5EncoderModel has 2 of the 6 attention sites"):
        transformers.AutoModelForTextEncoding.from_pretrained(tiny["t5"].path, **TRUST)


def test_a_plan_for_another_model_does_not_load(tiny, tmp_path):
    model = transformers.AutoModel.from_pretrained(tiny["vit"].path, **TRUST)
    model.config.mra = json.loads((tiny["bert"].path / "config.json").read_text())["mra"]
    model.save_pretrained(tmp_path / "mixed")
    with pytest.raises(Exception, match="ViTModel, which has none of its 2 sites"):
        transformers.AutoModel.from_pretrained(tmp_path / "mixed", **TRUST)


def test_source_code_of_a_checkpoint_is_fixed_text(tiny):
    """No value of a model enters it, and no name of ours is imported unguarded."""
    texts = {(e.path / "mra_runtime.py").read_text() for e in tiny.values()}
    texts |= {(e.path / "modeling_mra.py").read_text() for e in tiny.values()}
    assert len(texts) == 2
    from transformers.dynamic_module_utils import get_imports

    for name in ("mra_runtime.py", "modeling_mra.py"):
        needed = set(get_imports(tiny["bert"].path / name))
        assert not needed & {"mra_cli", "mra_kernels", "triton"}


# --- what a directory holds ------------------------------------------------------------------


@pytest.mark.checkpoints
def test_a_directory_holds_the_source_untouched_and_the_plan(minilm, minilm_patched):
    source = minilm.path
    weights = "model.safetensors"
    assert (minilm_patched / weights).stat().st_ino == (source / weights).stat().st_ino
    for name in ("tokenizer.json", "modules.json", "1_Pooling/config.json", "vocab.txt"):
        assert (minilm_patched / name).read_bytes() == (source / name).read_bytes()
        assert (minilm_patched / name).stat().st_ino != (source / name).stat().st_ino
    config = json.loads((minilm_patched / "config.json").read_text())
    assert config["mra"]["plan"] == json.loads((minilm_patched / "mra_plan.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("mra", "auto_map")} == original
    card = (minilm_patched / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0" in card
    assert "trust_remote_code=True" in card and "**exact** model" in card
    assert "embedding cosine 0.9" in card and "encoder.layer.5.attention.self` | mra" in card
    assert card.endswith((source / "README.md").read_text()[-200:].strip() + "\n")


def test_min_length_keeps_shorter_calls_exact(tiny):
    bert = tiny["bert"]
    model = mra_cli.load(bert.path, attn_implementation="sdpa").eval()
    source = str(bert.path.with_name("bert-source"))
    for length, approximates in ((72, True), (73, False)):
        plan = prepare(source, method=make_method("mra", 0.25), min_length=length).plan
        with patched(model, plan), torch.no_grad():
            same = equal(output_tensors(model(**bert.inputs)), bert.exact)
            near = torch.allclose(model(**bert.inputs)[0], bert.exact[0], atol=1e-4)
        assert (near is not approximates) and (not approximates or not same)


def test_plans_are_read_from_files_and_reports(cli, bert, text, tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--text", text, "--samples", "1", "--budget", "0.3,0.6", "--layers", "1")
    assert cli("analyze", bert, *arguments, "--json", report).code == 0
    plan = tmp_path / "plan.json"
    ran = cli("patch", bert, "--plan", report, "--budget", "0.6", "--dry-run", "--json", plan)
    assert ran.code == 0, ran
    (site,) = json.loads(plan.read_text())["sites"].values()
    assert site["budget"] == 0.6
    out = tmp_path / "out"
    ran = cli("patch", bert, "--plan", plan, "--min-length", "70", "--out", out, "--no-measure")
    assert ran.code == 0, ran
    written = json.loads((out / "mra_plan.json").read_text())["sites"]
    assert written == {name: {**site, "min_length": 70} for name in written}
    assert len(written) == 1


def test_patching_a_patched_checkpoint_replaces_its_plan(cli, bert, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("patch", bert, "--out", first, "--no-measure", "--budget", "0.5").code == 0
    assert cli("patch", first, "--out", second, "--no-measure", "--budget", "0.2").code == 0
    plan = json.loads((second / "config.json").read_text())["mra"]["plan"]
    assert {site["budget"] for site in plan["sites"].values()} == {0.2}
    assert (second / "README.md").read_text().count("mra-cli: begin") == 1


# --- run and verify --------------------------------------------------------------------------


def test_verify_passes_and_fails_where_it_should(cli, bert, text, tmp_path):
    out = tmp_path / "out"
    measured = ("--text", text, "--seq-len", "100", "--budget", "0.2")
    assert cli("patch", bert, "--out", out, *measured, "--copy").code == 0
    report_file = tmp_path / "report.json"
    asked = ("verify", out, "--text", text, "--json", report_file, "--min-recovery")
    ran = cli(*asked, "0.5")
    assert ran.code == 0, ran
    report = json.loads(report_file.read_text())
    assert report["ok"] and all(check["passed"] for check in report["checks"])
    assert sum(check["detail"] == "bit-identical" for check in report["checks"]) == 3

    manifest = out / "mra_manifest.json"
    data = json.loads(manifest.read_text())
    data["figures"]["damage"]["cosine_mean"] -= 0.02
    manifest.write_text(json.dumps(data))
    recovery = report["figures"]["damage"]["cosine_mean"]
    ran = cli(*asked, (1 + recovery) / 2)
    assert (ran.code, "2 of 8 checks failed; figures of the card: cosine_mean" in ran.err) == (1, 1)
    failed = [c["name"] for c in json.loads(report_file.read_text())["checks"] if not c["passed"]]
    assert failed == ["figures of the card", "recovery"]

    weights = out / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\0\0\x3f")
    ran = cli("verify", out, "--text", text)
    assert (ran.code, "model.safetensors has changed" in ran.err) == (1, True), ran
    weights.write_bytes(good)

    (out / "extra.py").write_text("")
    ran = cli("verify", out, "--text", text)
    assert (ran.code, "extra.py is not listed" in ran.err) == (1, True), ran


@pytest.mark.slow
def test_verify_does_not_run_code_that_is_not_ours(cli, bert, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    assert cli("patch", bert, "--out", out, "--no-measure").code == 0
    code = out / "modeling_mra.py"
    code.write_text(code.read_text() + f"\nimport pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    manifest = out / "mra_manifest.json"
    data = json.loads(manifest.read_text())
    data["files"].pop("modeling_mra.py")
    from mra_cli.staging import sha256

    data["files"]["modeling_mra.py"] = {"bytes": code.stat().st_size, "sha256": sha256(code)}
    manifest.write_text(json.dumps(data))
    ran = cli("verify", out)
    assert ran.code == 1 and "modeling_mra.py differ from this version's" in ran.err, ran
    assert not mark.exists()
    ran = cli("verify", out, "--trust-remote-code")
    assert ran.code == 0 and mark.exists(), ran


def test_run_generates_and_says_how_much_was_approximated(cli, saved, tmp_path):
    out = tmp_path / "out"
    plan = Plan.uniform(
        find_sites(load_checkpoint(str(saved("llama-gqa"))).model, BY_NAME["llama-gqa"].inputs()),
        make_method("mra", 0.25),
    )
    export.export(prepared_for(saved("llama-gqa"), plan), out, None)
    prompt = " ".join(["the"] * 70)
    ran = cli("run", out, prompt, "--max-new-tokens", "3", "--json", tmp_path / "answer.json")
    assert ran.code == 0, ran
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert (answer["approximated"], answer["calls"]) == (2, 6), "the prefill, not the decoding"
    assert answer["tokens"] == 72
    assert "approximated 2 of 6" in ran.err


def test_run_embeds_with_models_that_do_not_generate(cli, bert, tmp_path):
    out = tmp_path / "out"
    assert cli("patch", bert, "--out", out, "--no-measure").code == 0
    ran = cli("run", out, "the a of", "--json", "-")
    assert len(json.loads(ran.out)["embedding"]) == 64


def test_without_figures_the_card_says_so(cli, bert, tmp_path):
    out = tmp_path / "out"
    assert cli("patch", bert, "--out", out, "--no-measure").code == 0
    assert "Not measured." in (out / "README.md").read_text()


@torch.no_grad()
def test_figures_are_those_of_analyze(minilm_patched, minilm):
    """One way to measure: the same samples give the same errors and the same damage."""
    from mra_cli.analyze import analyze

    card = json.loads((minilm_patched / "mra_manifest.json").read_text())["figures"]
    samples = make_samples(minilm, seq_len=512, count=1)
    report = analyze(minilm, samples, make_method("mra", 0.25), [0.25])
    assert [s["error"] for s in card["sites"]] == [r.error for r in report.by_site]
    assert card["damage"]["cosine_mean"] == report.by_budget[0].damage.cosine_mean


def test_a_plan_that_names_no_site_is_refused(tiny):
    source = str(tiny["bert"].path.with_name("bert-source"))
    with pytest.raises(InputError, match="at least one attention site"):
        prepare(source, method=make_method("mra", 0.25), plan=Plan({}))
