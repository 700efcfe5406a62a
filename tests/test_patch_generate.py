"""Patched checkpoints generate and train as any model: each way of it, on what `from_pretrained`
gives.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

from architectures import ARCHITECTURES, comparable
from mra_cli import export
from mra_cli.errors import UnsupportedModelError
from mra_cli.methods import make_method
from mra_cli.methods.mra import Mra
from mra_cli.patching import patched
from mra_cli.plan import Plan
from mra_cli.prepare import prepare
from mra_cli.sites import find_sites
from mra_kernels import native

NEW = 10
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3},
    "sampled beam": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 24},
    "several": {"num_return_sequences": 2, "do_sample": True},
}
ONE_ROW = ("prompt lookup", "assisted")
NAMES = ("llama-gqa", "gemma3-text", "gpt-oss", "t5", "bart")


@pytest.fixture(scope="module", params=[(name, budget) for name in NAMES for budget in (0.3, 1.0)])
def made(request, tmp_path_factory):
    """A tiny model that generates, its plan, and itself as loaded from a patched directory."""
    name, budget = request.param
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.build()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    if model.config.is_encoder_decoder:
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    inputs = {
        k: v for k, v in architecture.inputs().items() if k in ("input_ids", "attention_mask")
    }
    try:
        sites = [
            dataclasses.replace(site, verdict="patch")
            for site in find_sites(model, architecture.inputs())
        ]
    except UnsupportedModelError:
        assert name == "t5" and not transformers.__version__.startswith("5.23"), name
        pytest.skip("its attention reached the interface later")
    plan = Plan.uniform(sites, make_method("mra3", budget, {"resolutions": (8, 4, 1)}))
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder / "source")
    prepared = prepare(str(folder / "source"), method=make_method("mra", budget), plan=plan)
    path = export.export(prepared, folder / "patched", None).path
    loaded, whole = _load(path), architecture.inputs()
    with torch.no_grad():
        answer = comparable(architecture, loaded(**whole), whole)[0]
        exact = comparable(architecture, model(**whole), whole)[0]
        with patched(model, plan):
            assert torch.equal(comparable(architecture, model(**whole), whole)[0], answer)
    assert bool((answer - exact).norm() < 1e-4 * exact.norm()) is (budget == 1.0)
    return model, plan, loaded, inputs, budget


def _load(path):
    classes = json.loads((path / "config.json").read_text())["auto_map"]
    auto = next(a for a in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM") if a in classes)
    loaded = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True).eval()
    assert sum("_mra_site" in vars(module) for module in loaded.modules()) > 1
    return loaded


def generate(model, inputs, **options):
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("way", WAYS)
def test_generates_as_the_model_patched_in_memory(made, way):
    """And, with everything computed exactly, as the exact model."""
    model, plan, loaded, inputs, budget = made
    if model.config.is_encoder_decoder and way in ("chunked prefill", "prompt lookup"):
        pytest.skip("not for encoder-decoders")
    if way == "prompt lookup" and not hasattr(transformers, "GgufConfig"):
        pytest.skip("wants a token that ends the text in older transformers")
    if way in ONE_ROW:
        inputs = {key: value[:1] for key, value in inputs.items()}
    tokens = generate(loaded, inputs, **WAYS[way])
    with patched(model, plan):
        expected = generate(model, inputs, **WAYS[way])
    assert torch.equal(tokens, expected)
    exact = generate(model, inputs, **WAYS[way])
    assert torch.equal(tokens, exact) or budget < 1.0


def test_assisted_by_a_smaller_model(made):
    model, plan, loaded, inputs, _ = made
    inputs = {key: value[:1] for key, value in inputs.items()}
    tokens = generate(loaded, inputs, assistant_model=model)
    with patched(model, plan):
        assert torch.equal(tokens, generate(model, inputs))


def test_static_and_dynamic_caches_agree(made):
    _, _, loaded, inputs, _ = made
    dynamic = generate(loaded, inputs)
    assert torch.equal(generate(loaded, inputs, cache_implementation="static"), dynamic)


def test_a_row_padded_on_the_left_is_the_row_alone(made):
    """With everything exact: blocks of an approximation would begin elsewhere."""
    model, _, loaded, inputs, budget = made
    if budget < 1.0 or model.config.is_encoder_decoder:
        pytest.skip("for decoders, exact")
    together = generate(loaded, inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = {"input_ids": inputs["input_ids"][row][mask.bool()][None]}
        assert torch.equal(generate(loaded, alone)[0, -NEW:], together[row, -NEW:])


# --- training --------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer and a trainable low-rank addition: LoRA, as peft would put it there."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(linear.out_features, rank) * 0.1)

    def forward(self, x):
        return self.linear(x) + x @ self.down.T @ self.up.T


def loss_and_gradients(model, inputs, *, checkpointing: bool = False, parameters=None):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    if checkpointing:
        model.gradient_checkpointing_disable()
    found = [p.grad.clone() for p in parameters or model.parameters() if p.grad is not None]
    model.zero_grad()
    model.eval()
    return found


def test_gradient_checkpointing_changes_no_gradient(made):
    _, _, loaded, inputs, _ = made
    if loaded.config.is_encoder_decoder and not loaded.supports_gradient_checkpointing:
        pytest.skip("not supported")
    for key in ("dropout", "dropout_rate", "attention_dropout"):
        if hasattr(loaded.config, key):
            setattr(loaded.config, key, 0.0)
    for module in loaded.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = loss_and_gradients(loaded, inputs)
    again = loss_and_gradients(loaded, inputs, checkpointing=True)
    assert len(plain) == len(again) > 10
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))
    assert any(bool(gradient.abs().sum() > 0) for gradient in plain)


def test_a_step_of_lora_lowers_the_loss(made):
    model, _, loaded, inputs, _ = made
    if model.config.is_encoder_decoder:
        pytest.skip("one kind will do")
    loaded.requires_grad_(False)
    adapters = []
    torch.manual_seed(0)
    for module in list(loaded.modules()):
        if isinstance(getattr(module, "q_proj", None), nn.Linear):
            module.q_proj = LowRank(module.q_proj)
            adapters += [module.q_proj.down, module.q_proj.up]
    assert adapters
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD(adapters, lr=0.01)
    losses = []
    loaded.train()
    for _ in range(3):
        loss = loaded(**inputs, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(bool((p.grad.abs() > 0).any()) for p in adapters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for module in list(loaded.modules()):
        if isinstance(getattr(module, "q_proj", None), LowRank):
            module.q_proj = module.q_proj.linear
    loaded.requires_grad_(True).eval()


@torch.no_grad()
def test_decoding_over_a_long_cache_approximates_as_in_memory(made, monkeypatch):
    """Where the C++ path is installed: its block means hang on the cache of the loaded model."""
    if native.reason_against() is not None:
        pytest.skip("no C++ here")
    model, plan, loaded, inputs, _ = made
    if model.config.model_type not in ("llama", "gemma3_text"):
        pytest.skip("two kinds will do")
    monkeypatch.setattr("mra_cli.methods.mra._LONG_CACHE", 16)
    approximated = []
    answer = Mra.__call__

    def counted(self, call):
        approximated.append(call.n_queries)
        return answer(self, call)

    monkeypatch.setattr(Mra, "__call__", counted)
    tokens = generate(loaded, inputs)
    assert 1 in approximated, "no decoding step was approximated"
    with patched(model, plan):
        assert torch.equal(tokens, generate(model, inputs))
