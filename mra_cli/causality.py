"""Does an output depend on what comes later?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_cli.measure import relative_error


def lookahead(
    attend: Callable[[AttentionCall], Tensor], call: AttentionCall, output: Tensor, kind: str
) -> float | None:
    """By how much the first half of the output moves when only the second half of the input does.

    Exact attention: 0. What agrees here agrees with a run on the first half alone, but for what a
    budget comes to at another length.

    Args:
        attend: What gives ``output`` of ``call``.
        kind: CS, or CC (whose keys are all there from the start); of others None comes back.
    """
    half = call.n_queries // 2
    if kind[0] != "C" or half == 0:
        return None
    other: dict[str, Any] = {}
    for name in ("query", "key", "value") if kind == "CS" else ("query",):
        tensor = getattr(call, name).detach()
        other[name] = torch.cat([tensor[:, :, :half], -tensor[:, :, half:]], 2)
    changed = attend(replace(call, **other))[:, :, :half]
    moved = relative_error(changed, output[:, :, :half], call.valid_rows[:, :half])
    return float(moved.mean())
