"""What the fits of all methods have in common: what they are given, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.sites import Site


@dataclass(frozen=True, eq=False)
class Captured:
    """Attention calls of one site, one sample each.

    Attributes:
        site: Which.
        train: To fit on.
        held_out: To measure on.
    """

    site: Site
    train: Sequence[AttentionCall]
    held_out: Sequence[AttentionCall]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit gives.

    Attributes:
        tensors: By name, as the method reads them; the first dimension is the heads, or the second.
        found: Figures and choices, JSON types: ``error``, and ``curves`` where pairs are chosen.
    """

    tensors: dict[str, Tensor]
    found: dict[str, Any]


class Fit(Protocol):
    """How a method is fitted; a frozen dataclass whose fields are settings."""

    method: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    """Kinds of sites that it can be fitted to."""

    def __call__(self, captured: Captured, generator: torch.Generator) -> Fitted: ...


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    most: float = 1.0,
) -> None:
    """Adam, in place, with gradients clipped.

    Args:
        parameters: What to change; ``requires_grad`` is set for as long as this runs.
        loss: Of the step of that number.
        steps, rate: How many, and the learning rate, which falls to nothing along a cosine.
        most: Largest norm of a gradient.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss(step).backward()
            torch.nn.utils.clip_grad_norm_(parameters, most)
            optimizer.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
