"""Texts to measure on: two that every Python brings along, and the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
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


def split_samples(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    held_out: Sequence[Text] | None,
    *,
    given: bool,
    seq_len: int | None,
    count: int,
    seed: int,
) -> tuple[Samples, Samples]:
    """Inputs to search on and others to verify on, which have nothing in common.

    Args:
        texts: To search on.
        held_out: To verify on; None: the second half of each of ``texts``, the first being for the
            search.
        given: Somebody chose the texts; else models that take none get other inputs.
        seq_len, count, seed: As in `make_samples`.

    Raises:
        InputError: As `make_samples`, or a text is on both sides.
    """
    if checkpoint.model.main_input_name != "input_ids" and not given:
        first, second = (
            make_samples(checkpoint, seq_len=seq_len, count=count, seed=s) for s in (seed, seed + 1)
        )
        return first, second
    halves = [text.halves() for text in texts]
    sides = (
        (list(texts), list(held_out)) if held_out else tuple(map(list, zip(*halves, strict=True)))
    )
    both = {text.name for text in sides[0]} & {text.name for text in sides[1]}
    if both:
        raise InputError(
            f"--held-out must be text that --text does not have, got {min(both)} in both; leave "
            "out --held-out to split each text in halves"
        )
    first, second = (
        samples_of(checkpoint, side, seq_len=seq_len, count=count, seed=seed) for side in sides
    )
    return first, second
