"""Texts to measure on: two that every Python brings along, and the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mra_cli.checkpoint import Checkpoint
from mra_cli.inputs import DEFAULT_TEXT_NAME, Samples, default_text, make_samples, read_text

_MODULES = (
    *("argparse", "tarfile", "typing", "smtplib", "optparse", "configparser", "mailbox"),
    *("difflib", "pickle", "statistics", "textwrap", "calendar", "doctest", "pdb", "pydoc"),
)


@dataclass(frozen=True)
class Text:
    """A text and where it comes from, in words."""

    name: str
    content: str

    def halves(self) -> tuple[Text, Text]:
        """Its first and its second half, cut at the end of a line."""
        middle = self.content.find("\n", len(self.content) // 2) + 1 or len(self.content) // 2
        return (
            Text(f"first half of {self.name}", self.content[:middle]),
            Text(f"second half of {self.name}", self.content[middle:]),
        )


def read_texts(names: Sequence[str]) -> list[Text]:
    """The texts of ``--text``: files, or ``help`` and ``code``; the former alone if none is named.

    Raises:
        InputError: A file is not there, not text, or empty.
    """
    return [_read(name) for name in dict.fromkeys(names or ["help"])]


def _read(name: str) -> Text:
    if name == "help":
        return Text(DEFAULT_TEXT_NAME, default_text())
    if name == "code":
        return Text("code of Python's standard library", _code())
    return Text(name, read_text(Path(name)))


def _code() -> str:
    """Source files of the running Python, those that most versions have."""
    specs = (importlib.util.find_spec(name) for name in _MODULES)
    paths = (Path(spec.origin) for spec in specs if spec is not None and spec.origin)
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


def samples_of(
    checkpoint: Checkpoint,
    texts: Sequence[Text] | None,
    *,
    seq_len: int | None,
    count: int,
    seed: int,
) -> Samples:
    """``count`` windows of each text; None: of the default text, or of what else the model takes.

    Raises:
        InputError: As `make_samples`.
    """
    if texts is None:
        return make_samples(checkpoint, seq_len=seq_len, count=count, seed=seed)
    made = [
        make_samples(
            checkpoint,
            text=text.content,
            text_name=text.name,
            seq_len=seq_len,
            count=count,
            seed=seed,
        )
        for text in texts
    ]
    return Samples.joined(made)
