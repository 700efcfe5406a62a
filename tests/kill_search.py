"""A search that is killed again and again, for test_search.py: run as a script, with the state's
path and how many results to live for; prints the plan if it gets so far.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from architectures import ARCHITECTURES
from mra_cli.checkpoint import Checkpoint
from mra_cli.inputs import make_samples
from mra_cli.methods import make_method
from mra_cli.search import SearchSetup, Target, journal, search


def main(state: str, lives: int) -> None:
    torch.set_num_threads(1)
    write = journal.Journal._write

    def write_and_die(self: journal.Journal) -> None:
        nonlocal lives
        lives -= 1
        if lives == 0 and len(self._results) % 2:  # half of the time before it is written
            os.kill(os.getpid(), signal.SIGKILL)
        write(self)
        if lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.Journal._write = write_and_die  # type: ignore[method-assign]
    model = next(a for a in ARCHITECTURES if a.name == "vit").build()
    checkpoint = Checkpoint("tiny", model, None, None, "none")
    sides = [make_samples(checkpoint, count=2, seed=seed) for seed in (0, 1)]
    setup = SearchSetup(make_method("mra", 0.25), (Target("density", 0.4),), budgets=(0.25, 0.5))
    report = search(checkpoint, *sides, setup, state=Path(state))
    made = report.made_plan()
    assert made is not None
    print(made.to_json())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
