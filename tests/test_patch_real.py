"""Real checkpoints, patched, in the hands of the libraries that people load them with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from mra_cli import export, fresh
from mra_cli.checkpoint import load_checkpoint
from mra_cli.inputs import default_text
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.prepare import prepare
from mra_cli.report import read_plan
from mra_cli.sites import output_tensors

pytestmark = pytest.mark.checkpoints

TRUST = {"trust_remote_code": True}
TEXTS = [default_text()[start : start + 1500] for start in (3000, 60_000, 300_000)]


def cosine(a, b) -> float:
    a, b = (torch.as_tensor(x).flatten().double() for x in (a, b))
    return float(torch.cosine_similarity(a, b, dim=0))


# --- an embedding model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm_patched(minilm, tmp_path_factory) -> Path:
    prepared = prepare("demo:minilm", method=make_method("mra", 0.25))
    return export.export(prepared, tmp_path_factory.mktemp("minilm") / "patched", None).path


@torch.no_grad()
def test_minilm_reloads_in_a_fresh_process(minilm, minilm_patched):
    batch = minilm.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plan = read_plan(minilm_patched / "mra_plan.json", None)
    with patched(minilm.model, plan.with_impl("reference")):
        expected = output_tensors(minilm.model(**inputs))
    run = fresh.Run(minilm_patched, "AutoModel", inputs, TRUST)
    answer = fresh.answers({"it": run})["it"]
    assert not isinstance(answer, str), answer
    assert all(torch.equal(a, b) for a, b in zip(answer, expected, strict=True))


def test_a_pipeline_is_patched(minilm, minilm_patched):
    make = transformers.pipeline
    options = {"tokenize_kwargs": {"truncation": True}}
    pipe = make("feature-extraction", model=str(minilm_patched), **TRUST)
    exact = make("feature-extraction", model=str(minilm_patched))
    near = cosine(pipe(TEXTS[0], **options), exact(TEXTS[0], **options))
    assert 0.9 < near < 0.9999
    plan = read_plan(minilm_patched / "mra_plan.json", None)
    batch = minilm.tokenizer(TEXTS[0], truncation=True, return_tensors="pt")
    with patched(minilm.model, plan), torch.no_grad():
        expected = minilm.model(**batch).last_hidden_state
    assert torch.equal(torch.tensor(pipe(TEXTS[0], **options)), expected)


def test_sentence_transformers_is_patched(minilm_patched, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="pip install '.[examples]'")
    exact = library.SentenceTransformer(str(minilm_patched)).encode(TEXTS)
    model = library.SentenceTransformer(str(minilm_patched), **TRUST)
    embeddings = model.encode(TEXTS)
    near = [cosine(a, b) for a, b in zip(embeddings, exact, strict=True)]
    assert all(0.9 < value < 0.9999 for value in near)
    model.save_pretrained(str(tmp_path / "again"))
    again = library.SentenceTransformer(str(tmp_path / "again"), **TRUST).encode(TEXTS)
    assert (again == embeddings).all()


# --- a language model from GGUF --------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_patched(smollm2, tmp_path_factory) -> Path:
    prepared = prepare("demo:smollm2", method=make_method("mra", 0.25))
    return export.export(prepared, tmp_path_factory.mktemp("smollm2") / "patched", None).path


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_from_gguf(smollm2_patched):
    """Dequantised to bfloat16, reloaded bit-identical, and it still talks."""
    config = json.loads((smollm2_patched / "config.json").read_text())
    assert "quantization_config" not in config
    checkpoint = load_checkpoint(str(smollm2_patched))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    assert model.dtype == torch.bfloat16
    plan = read_plan(smollm2_patched / "mra_plan.json", None)
    prompt = default_text()[5000:6200]
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    with patched(model, plan.with_impl("reference")):
        expected = output_tensors(model(**inputs, use_cache=False))
    run = fresh.Run(smollm2_patched, "AutoModelForCausalLM", {**inputs, "use_cache": False}, TRUST)
    answer = fresh.answers({"it": run})["it"]
    assert not isinstance(answer, str), answer
    assert torch.equal(answer[0], expected[0])
    exact = output_tensors(model(**inputs, use_cache=False))
    assert not torch.equal(answer[0], exact[0])

    loaded = transformers.AutoModelForCausalLM.from_pretrained(smollm2_patched, **TRUST).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    tokens = loaded.generate(**inputs, **options)
    with patched(model, plan):
        assert torch.equal(tokens, model.generate(**inputs, **options))
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(loaded.generate(**inputs, **options)[0])


@pytest.mark.slow
def test_lora_of_peft_trains_a_patched_model(smollm2_patched):
    peft = pytest.importorskip("peft", reason="pip install '.[examples]'")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_patched, dtype=torch.float32, **TRUST
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_patched)
    inputs = tokenizer(default_text()[5000:5800], return_tensors="pt")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
