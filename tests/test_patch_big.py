"""Sharded, tied, offloaded and big checkpoints: weights stay where they are."""

from __future__ import annotations

import functools
import json
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from cli_support import python
from mra_cli import export, fresh
from mra_cli.inputs import dry_run
from mra_cli.measure import with_resident_bytes
from mra_cli.methods import make_method
from mra_cli.patching import patched
from mra_cli.prepare import prepare
from mra_cli.sites import find_sites, output_tensors, sketch_sites

TRUST = {"trust_remote_code": True}
IDS = {"input_ids": torch.arange(3, 99)[None], "attention_mask": torch.ones(1, 96).long()}


@pytest.fixture(scope="module")
@torch.no_grad()
def sharded(tmp_path_factory):
    """A Llama of several shards with tied embeddings, patched, and what it answers in memory."""
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder / "source", max_shard_size="100KB")
    prepared = prepare(str(folder / "source"), method=make_method("mra", 0.25))
    done = export.export(prepared, folder / "patched", None)
    assert len([name for name in done.linked if name.endswith(".safetensors")]) > 2
    with patched(model, prepared.plan):
        approximated = output_tensors(model(**IDS))
    with patched(model, prepared.plan.with_impl("reference")):
        reference = output_tensors(model(**IDS))
    return done.path, approximated, reference


def test_shards_and_tied_weights_reload(sharded):
    path, _, reference = sharded
    run = fresh.Run(path, "AutoModelForCausalLM", IDS, TRUST)
    (answer,) = fresh.answers({"it": run})["it"]
    assert torch.equal(answer, reference[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **TRUST)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("memory", [None, {"cpu": "150KB"}], ids=["fits", "offloaded to disk"])
@torch.no_grad()
def test_device_maps(sharded, tmp_path, memory):
    pytest.importorskip("accelerate", reason="needs accelerate")
    if memory and not hasattr(transformers, "GgufConfig"):
        pytest.skip("older transformers can't run even the exact model so")
    path, approximated, _ = sharded
    places = {"max_memory": memory, "offload_folder": tmp_path} if memory else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map="auto", **places, **TRUST
    ).eval()
    if memory:
        assert "disk" in {str(place) for place in model.hf_device_map.values()}
    assert torch.equal(output_tensors(model(**IDS))[0], approximated[0])


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gemma3-text", "t5", "vit", "modernbert"])
def test_a_sketch_finds_the_sites_that_a_run_finds(saved, name):
    """Without a weight: same names, kinds, heads, widths and windows."""
    from mra_cli.checkpoint import load_checkpoint, sketch_checkpoint

    if name in ("t5", "modernbert") and not hasattr(transformers, "GgufConfig"):
        pytest.skip("its attention reached the interface later")
    path = saved(name)
    whole, shape = load_checkpoint(str(path)), sketch_checkpoint(path)
    assert {p.device.type for p in shape.model.parameters()} == {"meta"}
    found = find_sites(whole.model, dry_run(whole))
    sketched = sketch_sites(shape.model, dry_run(shape))
    assert sketched == found


def write_llama_7b(path: Path) -> None:
    """The files of a 7B model in bfloat16, 13 GB long; holes, which take no disk."""
    path.mkdir()
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 32)
    config.save_pretrained(path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shards: list[dict] = [{}]
    for name, tensor in model.state_dict().items():
        header, begin = (
            shards[-1],
            max((t["data_offsets"][1] for t in shards[-1].values()), default=0),
        )
        if begin > 4 << 30:
            shards.append(header := {})
            begin = 0
        offsets = [begin, begin + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    where = {}
    for number, header in enumerate(shards, 1):
        file = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + max(t["data_offsets"][1] for t in header.values()))
        where |= dict.fromkeys(header, file.name)
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


PATCH = """
import sys, time
import transformers, mra_cli.export as export
from mra_cli.prepare import figures_of, prepare
from transformers import LlamaForCausalLM
from mra_cli.measure import peak_process_bytes
from mra_cli.methods import make_method
from pathlib import Path
started = time.perf_counter()
prepared = prepare(sys.argv[1], method=make_method("mra", 0.25))
figures, reason = figures_of(prepared)
export.export(prepared, Path(sys.argv[2]), figures, mode="link")
seconds = time.perf_counter() - started
print(len(prepared.plan.sites), seconds, peak_process_bytes())
"""
LOAD = """
import sys, time
sys.modules["mra_cli"] = sys.modules["mra_kernels"] = None
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
held = [line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")]
print(sum("_mra_site" in vars(m) for m in model.modules()), model.dtype, int(held[0]) * 1024)
"""


@pytest.mark.slow
def test_a_7b_directory_is_patched_in_seconds_and_loads_without_its_weights(tmp_path):
    """Under 5 s after imports and under 2 GiB in all; loaded, the weights stay in the file."""
    write_llama_7b(tmp_path / "big")
    total = sum(file.stat().st_size for file in (tmp_path / "big").iterdir())
    assert total > 12 << 30
    call = python("-c", PATCH, tmp_path / "big", tmp_path / "out")
    done = subprocess.run(**call, capture_output=True, text=True, check=True)
    sites, seconds, peak = done.stdout.split()
    assert (sites, float(seconds) < 5, int(peak) < 2 << 30) == ("32", True, True), done.stdout
    call = python("-c", LOAD, tmp_path / "out")
    done = subprocess.run(**call, capture_output=True, text=True, check=True)
    sites, dtype, held = done.stdout.split()
    assert (sites, dtype, int(held) < 2 << 30) == ("32", "torch.bfloat16", True), done.stdout


def test_copying_streams(tmp_path):
    """Weights are copied without being held."""
    from mra_cli.staging import place

    with (tmp_path / "a").open("wb") as stream:
        stream.truncate(256 << 20)
    copy = functools.partial(place, tmp_path / "a", tmp_path / "b", "copy")
    assert with_resident_bytes(copy, torch.device("cpu"))[1] < 100 << 20
    (tmp_path / "b").unlink()
