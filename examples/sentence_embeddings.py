"""Patch an embedding model and use it through sentence-transformers.

pip install 'mra-cli[examples]'
python examples/sentence_embeddings.py demo:minilm minilm-mra
"""

from __future__ import annotations

import subprocess
import sys
from pydoc_data.topics import topics

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim

source, directory = sys.argv[1:]

command = [sys.executable, "-m", "mra_cli", "patch", source, "--out", directory, "--budget", "0.5"]
subprocess.run([*command, "--samples", "1"], check=True)

texts = [topics[name] for name in ("for", "while", "floating", "formatstrings")]
exact = SentenceTransformer(directory).encode(texts)  # without trust: the exact model
patched = SentenceTransformer(directory, trust_remote_code=True).encode(texts)
for text, near in zip(texts, cos_sim(exact, patched).diagonal(), strict=True):
    print(f"cosine {near:.4f} to the exact embedding: {' '.join(text.split())[:50]}")
