"""Transcript equality of speech models: does the approximated model write down the same?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate.scores import Measure
from mra_cli.inputs import Samples
from mra_cli.media import LONGEST_TRANSCRIPT, written

Transcript = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Transcripts:
    """The task; `make` makes it."""

    checkpoint: Checkpoint
    batches: list[dict[str, Any]]
    longest: int

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        samples: Samples,
        text: str,
        length: int | None,
        count: int,
        seed: int,
    ) -> Transcripts:
        """Greedy transcripts, of at most ``length`` tokens, of the sounds among the samples.

        Raises:
            InputError: Not a model that turns sounds into text.
        """
        model = checkpoint.model
        main = model.main_input_name
        if not model.can_generate() or main not in ("input_features", "input_values"):
            raise InputError(
                f"the task transcript is for models that turn sounds into text; {checkpoint.name} "
                f"is {type(model).__name__}; leave it out"
            )
        return cls(checkpoint, samples.batches, length or LONGEST_TRANSCRIPT)

    @property
    def name(self) -> str:
        return f"transcripts of up to {self.longest} tokens"

    @property
    def items(self) -> int:
        return len(self.batches)

    def run(self) -> list[Transcript]:
        return [
            tuple(written(self.checkpoint, batch, self.longest)[0].tolist())
            for batch in self.batches
        ]

    def measures(self, exact: list[Transcript], run: list[Transcript]) -> tuple[Measure, ...]:
        pairs = list(zip(exact, run, strict=True))
        same = sum(a == b for a, b in pairs) / len(pairs)
        wrong = sum(edits(a, b) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs))
        return (
            Measure("same transcripts", 1.0, same, percent=True),
            Measure("tokens changed", 0.0, wrong, higher_is_better=False, percent=True),
        )


def edits(first: Transcript, second: Transcript) -> int:
    """Fewest insertions, deletions and replacements that turn one into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
