"""What `test_errors_*.py` share beside the fixtures in conftest.py.

Bad input gets one clear line (what was expected, what was got, what to do) and leaves nothing.
Most cases call `main` in this process, error boundary and all; what needs a real process has one.
"""

from __future__ import annotations

import collections
import os
import re
import sys
from dataclasses import dataclass

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mra_cli.inputs import default_text

WORDS = [word for word, _ in collections.Counter(default_text().split()).most_common(80)]
TEXT = " ".join(WORDS[i * i % 80] for i in range(600))


@dataclass(frozen=True)
class Ran:
    """What a command said; `err` without colours and boxes, its white space as single blanks."""

    code: int
    out: str
    raw_err: str

    @property
    def err(self):
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", self.raw_err)
        return " ".join(plain.split())


def assert_refused(ran, says, code=1):
    assert ran.code == code, ran
    assert ran.out == ""
    assert "Traceback" not in ran.raw_err
    if code == 1:
        assert re.fullmatch(r"Error: [^\n]{10,}\n", ran.raw_err)
    else:
        assert re.search("Usage: .*mra-cli", ran.err)
        assert "Error" in ran.err
    for strange in ("unexpected [a-z]*(error|exception)", "please report", "for details", "above"):
        assert not re.search(strange, ran.err, re.IGNORECASE), ran.err
    unsaid = [part for part in says if not re.search(part, ran.err, re.IGNORECASE)]
    assert unsaid == [], ran.err


def python(*arguments, **environment):
    """Arguments of `subprocess` for a fresh Python without our test settings.

    Nor with this process's `sys.path`, where transformers may have put a cache of modules: its
    `transformers_modules` would hide the child's own.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("MRA_DEBUG", "TQDM_DISABLE")}
    return {"args": [sys.executable, *map(str, arguments)], "env": env | environment}


def save_tokenizer(path):
    special = ["[UNK]", "[PAD]", "[CLS]", "[MASK]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 4)]
    )
    names = dict(zip(("unk", "pad", "cls", "mask", "sep"), special, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{key}_token": token for key, token in names.items()}
    ).save_pretrained(path)
