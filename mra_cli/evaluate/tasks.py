"""Tasks that show what approximating does to a model's use, where its loss hides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mra_cli.checkpoint import Checkpoint
from mra_cli.errors import InputError
from mra_cli.evaluate.needles import Needles
from mra_cli.evaluate.ranking import PairRanking
from mra_cli.evaluate.scores import Measure
from mra_cli.evaluate.transcripts import Transcripts
from mra_cli.inputs import Samples

__all__ = ["TASKS", "Measure", "Task", "TaskFigures", "make_task"]


class Task(Protocol):
    """Something a model is asked to do, the same each time."""

    @property
    def name(self) -> str:
        """What it is, in words, with the length."""

    @property
    def items(self) -> int:
        """Answers it asks for."""

    def run(self) -> Any:
        """Let the model, as it is now, do it."""

    def measures(self, exact: Any, run: Any) -> tuple[Measure, ...]:
        """Scores of what two runs gave, the first by the exact model."""


@dataclass(frozen=True)
class TaskFigures:
    """How a model did at a task, exactly and approximated.

    Attributes:
        task: Name of the task.
        items: Answers it asked for.
        measures: The scores.
    """

    task: str
    items: int
    measures: tuple[Measure, ...]


TASKS: dict[str, Callable[[Checkpoint, Samples, str, int | None, int, int], Task]] = {
    "needles": Needles.make,
    "ranking": PairRanking.make,
    "transcript": Transcripts.make,
}


def make_task(
    spec: str, checkpoint: Checkpoint, samples: Samples, text: str, *, count: int, seed: int
) -> Task:
    """The task ``NAME`` or ``NAME:LENGTH``, its length in tokens.

    Args:
        checkpoint: The model that will do it.
        samples: What else it is measured on; the length is theirs if none is given.
        text: What haystacks and passages are made of.
        count: Contexts to make, for tasks that have several.
        seed: Chooses them.

    Raises:
        InputError: No such task, or one that this model can't do.
    """
    name, colon, length = spec.partition(":")
    if name not in TASKS or (colon and not (length.isdecimal() and int(length) > 0)):
        raise InputError(
            f"a task must be one of {', '.join(TASKS)}, with a length in tokens where wanted, like "
            f"needles:4096; got {spec!r}"
        )
    wanted = int(length) if colon else None
    return TASKS[name](checkpoint, samples, text, wanted, count, seed)
