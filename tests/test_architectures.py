"""Every architecture that transformers routes through its attention interface, patched or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from architectures import ARCHITECTURES, Architecture, comparable
from mra_cli.errors import UnsupportedModelError
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.sites import Site, find_sites

INTERFACE = [a for a in ARCHITECTURES if a.interface]
OWN_ATTENTION = [a for a in ARCHITECTURES if not a.interface]


def name_of(architecture: Architecture) -> str:
    return architecture.name


def patchable(sites: list[Site]) -> list[Site]:
    """The sites, those included that are left exact only for being as small as all things here."""
    assert all(site.verdict != "refused" for site in sites)
    return [dataclasses.replace(site, verdict="patch") for site in sites]


def largest_difference(outputs, references) -> float:
    pairs = zip(outputs, references, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def implementations(config) -> str:
    """The attention implementations of a configuration and all inside it."""
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return " ".join([str(config._attn_implementation), *map(implementations, filter(None, inner))])


def test_the_catalogue_is_complete():
    assert (len(INTERFACE), len(OWN_ATTENTION)) == (67, 16)


@pytest.mark.parametrize("architecture", INTERFACE, ids=name_of)
@torch.no_grad()
def test_full_budget_is_exact_and_restoring_is_bit_identical(architecture):
    model, inputs = architecture.build(), architecture.inputs()
    reference = comparable(architecture, model(**inputs), inputs)
    sites = patchable(find_sites(model, inputs))
    for name, options in [
        ("mra2", {"resolutions": (8, 1)}),
        ("mra2s", {"resolutions": (4, 1)}),
        ("mra3", {"resolutions": (8, 4, 1)}),
        ("mra", {"rows": 8}),
    ]:
        plan = Plan.uniform(sites, make_method(name, 1.0, options))
        with patched(model, plan):
            output = comparable(architecture, model(**inputs), inputs)
        assert largest_difference(output, reference) <= 1e-5
    # A small budget must show: else nothing was replaced, and the lines above prove nothing.
    with patched(model, Plan.uniform(sites, make_method("mra2", 0.2, {"resolutions": (8, 1)}))):
        output = comparable(architecture, model(**inputs), inputs)
    assert all(torch.isfinite(tensor).all() for tensor in output)
    assert largest_difference(output, reference) > 1e-3
    restored = comparable(architecture, model(**inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(restored, reference, strict=True))
    assert not any("_mra_site" in vars(module) for module in model.modules())
    assert "mra_" not in implementations(model.config)


@pytest.mark.parametrize("architecture", OWN_ATTENTION, ids=name_of)
@torch.no_grad()
def test_attention_of_their_own_is_refused_and_untouched(architecture):
    model, inputs = architecture.build(), architecture.inputs()
    reference = comparable(architecture, model(**inputs), inputs)
    with pytest.raises(UnsupportedModelError, match="attention interface"):
        find_sites(model, inputs)
    after = comparable(architecture, model(**inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, reference, strict=True))
    assert "mra_" not in implementations(model.config)


KINDS = {
    "bert": "NS NS",
    "albert": "NS",
    "llama-gqa": "CS CS",
    "bert-decoder": "CS CC CS CC",
    "t5": "NS NS CS CC CS CC",
    "whisper": "NS NS CS CC CS CC",
    "modernbert": "NS NS",
    "clip": "NS NS CS CS",
    "gemma3-vlm": "NS NS CS CS",
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    architecture = next(a for a in INTERFACE if a.name == name)
    sites = find_sites(architecture.build(), architecture.inputs())
    assert " ".join(site.kind for site in sites) == KINDS[name]


def facts(name: str) -> list[Site]:
    architecture = next(a for a in INTERFACE if a.name == name)
    return find_sites(architecture.build(), architecture.inputs())


def test_windows_longer_than_the_probe_are_known():
    """The mask of a short dry run cuts no row; its closures still tell the window."""
    config = transformers.MistralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=512,
    )
    model = transformers.MistralForCausalLM(config).eval()
    (site,) = find_sites(model, {"input_ids": torch.ones(1, 80, dtype=torch.long)})
    assert (site.window, site.verdict) == (512, "patch")


def test_facts_of_sites():
    albert = facts("albert")
    assert [site.calls for site in albert] == [2], "one module, called once per layer"
    deepseek = facts("deepseek-v3")[0]
    assert deepseek.head_dim != deepseek.value_dim
    llama = facts("llama-gqa")[0]
    assert (llama.heads, llama.kv_heads) == (4, 2)
    gemma2 = facts("gemma2")
    assert [site.window for site in gemma2] == [16, None]
    assert [site.verdict for site in gemma2] == ["exact", "patch"]
    assert "16 keys" in gemma2[0].reason
    assert gemma2[0].extras == ("soft-cap",)
    assert facts("gpt-oss")[0].extras == ("sinks",)
    assert facts("t5")[0].extras == ("bias",)
    assert facts("modernbert")[1].window == 17, "the mask counts, not the keyword argument"
    assert facts("vit")[0].grid == (9, 9)
    assert facts("bert")[0].grid is None
    assert {site.verdict for site in facts("swin")} == {"exact"}


@torch.no_grad()
def test_a_model_that_depends_on_the_implementation_elsewhere_is_refused():
    """Part of it goes through the interface, part adds the host's mask to its own scores."""
    architecture = next(a for a in INTERFACE if a.name == "bert")
    model, inputs = architecture.build(), architecture.inputs()
    embeddings = model.embeddings
    plain = embeddings.forward

    def forward(*args, **kwargs):
        other = model.config._attn_implementation != "sdpa"
        return plain(*args, **kwargs) + (0.1 if other else 0.0) * torch.randn(
            1, 1, model.config.hidden_size
        )

    embeddings.forward = forward
    sites = find_sites(model, inputs)
    assert {site.verdict for site in sites} == {"refused"}
    assert "depend on how attention is computed" in sites[0].reason
