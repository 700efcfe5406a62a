"""Patch a language model on disk, then generate with transformers alone.

    python examples/patch_and_generate.py demo:smollm2 smollm2-mra

The second half is what a user of the directory runs: it does not need mra-cli.
"""

from __future__ import annotations

import subprocess
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

source, directory = sys.argv[1:]

command = [sys.executable, "-m", "mra_cli", "patch", source, "--out", directory, "--budget", "0.25"]
subprocess.run([*command, "--samples", "1", "--seq-len", "128"], check=True)

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
prompt = "The quick brown fox jumps over the lazy dog. " * 12 + "The quick brown"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print("attention:", model.config._attn_implementation)
print("goes on:", tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
