"""Plans of any method on disk: what reloads, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers

from architectures import ARCHITECTURES
from mra_cli import export, fresh
from mra_cli.bench.single import BenchSetup, cases
from mra_cli.bench.workload import RandomWorkload
from mra_cli.errors import InputError
from mra_cli.methods import METHODS, check_model, fitting_sites, make_method, make_methods
from mra_cli.methods.base import About
from mra_cli.methods.vmean import VMean
from mra_cli.patching import patched
from mra_cli.plan import Plan, SitePlan
from mra_cli.prepare import prepare
from mra_cli.sites import find_sites, output_tensors

LENGTH = 96


def built(name: str, path: Path):
    next(a for a in ARCHITECTURES if a.name == name).build().save_pretrained(path)
    return path


@pytest.mark.slow
@torch.no_grad()
def test_every_method_reloads_bit_identical_without_us(tmp_path):
    """One layer for each, padding in a batch of ragged lengths."""
    names = [name for name, method in METHODS.items() if not method.about.calibrated]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=len(names),
        num_attention_heads=4,
        intermediate_size=37,
        max_position_embeddings=128,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(10, 90, (2, LENGTH))
    attended = torch.ones_like(ids)
    attended[1, 70:] = 0
    inputs = {"input_ids": ids, "attention_mask": attended}
    sites = find_sites(model, inputs)
    methods = dict(zip((site.name for site in sites), names, strict=True))
    plan = Plan({site: SitePlan(make_method(name, 0.3)) for site, name in methods.items()})
    with patched(model, plan.with_impl("reference")):  # what runs without our kernels
        expected = output_tensors(model(**inputs))
    model.save_pretrained(tmp_path / "source")
    prepared = prepare(str(tmp_path / "source"), method=make_method("mra", 0.3), plan=plan)
    done = export.export(prepared, tmp_path / "patched", None)
    run = fresh.Run(done.path, "AutoModel", inputs, {"trust_remote_code": True})
    answers = fresh.answers({"it": run})["it"]
    assert not isinstance(answers, str), answers
    assert len(answers) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
    exact = output_tensors(model(**inputs))
    assert not torch.allclose(answers[0], exact[0], atol=1e-3)


def test_a_plan_of_a_method_that_cannot_serve_is_refused(tmp_path):
    source = str(built("llama-gqa", tmp_path / "llama"))
    with pytest.raises(InputError, match=r"nystrom serves NS, NC attention, and .* CS; choose"):
        prepare(source, method=make_method("nystrom", 0.3))
    name = "model.layers.0.self_attn"
    plan = Plan({name: SitePlan(make_method("skein", 0.3))})
    with pytest.raises(InputError, match="skein serves NS, NC"):
        prepare(source, method=make_method("mra", 0.3), plan=plan)


# --- methods that are calibrated on a model ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitted(VMean):
    """Stands for a method with a calibration: knows its site, and the model it is for."""

    name: ClassVar[str] = "fitted"
    about: ClassVar[About] = dataclasses.replace(VMean.about, calibrated=True)
    hidden: ClassVar[tuple[str, ...]] = ("site",)

    calibration: str = ""
    site: str = ""

    def at(self, site):
        return dataclasses.replace(self, site=site)

    def reason_against_model(self, fingerprint):
        fits = fingerprint == self.calibration
        return None if fits else f"fitted must be calibrated for this model, got {fingerprint}"


@pytest.fixture
def fitted(monkeypatch):
    monkeypatch.setitem(METHODS, "fitted", Fitted())
    return make_method("fitted", 0.3, {"calibration": "mine"})


def test_a_calibrated_method_knows_its_site_and_its_model(fitted, tmp_path):
    model = next(a for a in ARCHITECTURES if a.name == "bert").build()
    sites = [dataclasses.replace(s, verdict="patch") for s in find_sites(model, _inputs())]
    plan = Plan.uniform(sites, fitted)
    assert [entry.method.site for entry in plan.sites.values()] == [site.name for site in sites]
    assert "site" not in fitted.knobs and "site" not in fitted.settings()
    assert Plan.from_dict(plan.to_dict()) == plan
    check_model(fitted, "mine")
    with pytest.raises(InputError, match="calibrated for this model, got other"):
        check_model(fitted, "other")
    assert fitting_sites(fitted, sites) == sites
    assert "fitted" not in {method.name for method in make_methods("all", 0.3, {}, "auto")}


def test_calibrations_do_not_travel_nor_meet_random_numbers(fitted, tmp_path):
    found = cases(RandomWorkload(("NS",)), BenchSetup((256,), (fitted,)))
    assert "calibrated for a model; time that: mra-cli bench MODEL" in found[0].refusal
    source = str(built("bert", tmp_path / "bert"))
    with pytest.raises(InputError, match="calibrated for this model"):
        prepare(source, method=fitted)
    fingerprint = prepare(source, method=make_method("mra", 0.3)).checkpoint.fingerprint
    mine = make_method("fitted", 0.3, {"calibration": fingerprint})
    with pytest.raises(InputError, match=r"can't carry the calibration of fitted .*; use another"):
        prepare(source, method=mine)


def _inputs():
    return {"input_ids": torch.randint(10, 90, (1, LENGTH))}
