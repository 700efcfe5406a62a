"""How far work has come, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many steps are behind us."""


@dataclass
class Meter:
    """Steps done."""

    progress: Progress
    total: int
    done: int = 0
    name: str = ""

    def stage(self, name: str) -> None:
        """What is done from here on."""
        self.name = name
        self.step(0)

    def step(self, count: int = 1) -> None:
        """So many steps are done."""
        self.done += count
        self.progress(self.name, self.done, max(self.total, self.done))
