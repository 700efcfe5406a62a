"""Evaluate a patched language model with lm-evaluation-harness, next to the exact one.

    pip install 'mra-cli[examples]'
    mra-cli patch demo:smollm2 --out smollm2-mra
    python examples/evaluate_with_lm_eval.py smollm2-mra

The task is made here, of Python's help texts, and needs no network: which of four sentences goes
on with a passage? Any task of the harness runs the same way.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

directory = sys.argv[1]
questions = int(sys.argv[2]) if len(sys.argv) > 2 else 20


def documents() -> list[dict[str, object]]:
    """Passages of 100 words, and four ways to go on; the right one comes first."""
    chance, words = random.Random(0), [text.split() for _, text in sorted(topics.items())]
    long = [text for text in words if len(text) > 150]
    made = []
    for number in range(questions):
        text = long[number % len(long)]
        others = [" ".join(chance.choice(long)[20:32]) for _ in range(3)]
        passage, right = " ".join(text[:100]), " ".join(text[100:112])
        made.append({"passage": passage, "choices": [right, *others]})
    return made


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "questions.jsonl"
    file.write_text("\n".join(json.dumps(document) for document in documents()))
    task = {
        "task": "goes_on",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for trust in (False, True):
        model = HFLM(pretrained=directory, trust_remote_code=trust, device="cpu", batch_size=4)
        results = simple_evaluate(
            model=model, tasks=[ConfigurableTask(config=dict(task))], bootstrap_iters=0
        )
        accuracy = results["results"]["goes_on"]["acc,none"]
        print(f"{'patched' if trust else 'exact'}: accuracy {accuracy:.3f} of {questions}")
