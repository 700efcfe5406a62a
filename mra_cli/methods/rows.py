"""Softmax attention over any part of the keys, some rows at a time: what the methods share.

A method says which rows look at which keys. Masks, scaling, soft-cap, bias, sinks, grouped heads,
rows that see nothing and stable sums are seen to here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mra_cli.calls import AttentionCall
from mra_kernels import AttentionMask, ScoreRule
from mra_kernels.reference import for_blind_rows
from mra_kernels.scores import gather_bias

_FLOATS_IN_FLIGHT = 1 << 22
"""Scores, or gathered numbers, in flight at once: bounds each temporary to 16 MB."""

Keep = Callable[[Tensor, Tensor], Tensor]
"""Which pairs of rows ``[..., R, 1]`` and keys ``[..., 1, K]`` (positions) count, bool."""


@dataclass
class Tally:
    """Takes down what a call computes.

    Attributes:
        products: Multiply-adds in matrix products.
        entries: Exactly computed scores that the mask allows, of real rows, ``[B, H]``; None:
            don't count them, which takes time.
        settled: Knobs that followed from the budget.
    """

    products: int = 0
    entries: Tensor | None = None
    settled: dict[str, int] = field(default_factory=dict)


class SoftmaxRows:
    """The softmax of every query row, gathered part by part; a key of a row must be in one part.

    Attributes:
        query, key, value: ``[B, H, N or M, D]``, float32 (float64 stays), key heads repeated.
        mask: Who may see whom.
        rule: How dot products become scores.
    """

    def __init__(self, call: AttentionCall, tally: Tally) -> None:
        assert call.mask is not None
        dtype = call.query.dtype if call.query.dtype == torch.float64 else torch.float32
        group = call.query.shape[1] // call.key.shape[1]
        self.mask, self.tally, self._sinks = call.mask, tally, call.sinks
        self.rule = ScoreRule(call.scaling, call.softcap, call.bias)
        self.query = call.query.to(dtype)
        self.key, self.value = (
            x.to(dtype) if group == 1 else x.to(dtype).repeat_interleave(group, 1)
            for x in (call.key, call.value)
        )
        self._peak = self.query.new_full(self.query.shape[:3], -torch.inf)
        self._mass = self.query.new_zeros(self.query.shape[:3])
        self._weighted = self.query.new_zeros(*self.query.shape[:3], self.value.shape[3])

    def add(self, rows: Tensor, keys: Tensor | None, keep: Keep | None = None) -> None:
        """Exactly computed scores of groups of rows with groups of keys.

        Args:
            rows: Positions, int64 ``[B or 1, H or 1, G, R]``, -1 for none; each at most once.
            keys: Positions, int64 ``[B or 1, H or 1, G or 1, K]``, -1 for none; None: all.
            keep: Leaves out pairs, beside those that the mask hides.
        """
        batch, heads, _, width = self.query.shape
        n_keys = self.mask.n_keys if keys is None else keys.shape[3]
        per_row = batch * heads * max(n_keys, width)
        most = max(1, _FLOATS_IN_FLIGHT // per_row)
        if rows.shape[3] > most:
            for part in rows.split(most, 3):
                self.add(part, keys, keep)
            return
        gathered = batch * heads * n_keys * width
        step = max(1, _FLOATS_IN_FLIGHT // max(gathered, per_row * rows.shape[3]))
        for first in range(0, rows.shape[2], step):
            own = rows[:, :, first : first + step]
            whose = keys
            if keys is not None and keys.shape[2] > 1:
                whose = keys[:, :, first : first + step]
            logits = self.logits(own, whose, keep)
            self.count(own, logits)
            self.add_scored(own, logits, self.values(whose))

    def logits(self, rows: Tensor, keys: Tensor | None, keep: Keep | None = None) -> Tensor:
        """Scores ``[B, H, G, R, K]``, -inf where hidden. Arguments as in `add`."""
        where = torch.arange(self.mask.n_keys, device=rows.device)[None, None, None]
        key = self.key[:, :, None]
        if keys is not None:
            where, key = keys, take(self.key, keys)
        dots = take(self.query, rows) @ key.transpose(-1, -2)
        row, column = rows[..., :, None], where[..., None, :]
        bias = None
        if self.rule.bias is not None:
            of = [torch.arange(n, device=rows.device) for n in self.query.shape[:2]]
            places = row.clamp(min=0), column.clamp(min=0)
            batch, head = of[0][:, None, None, None, None], of[1][:, None, None, None]
            bias = gather_bias(self.rule.bias.to(dots.dtype), batch, head, *places)
        logits = self.rule.logits(dots, bias)
        seen = self.seen(rows, where, keep)
        return logits if seen is None else logits.masked_fill(~seen, -torch.inf)

    def seen(self, rows: Tensor, keys: Tensor, keep: Keep | None = None) -> Tensor | None:
        """Which pairs count, bool ``[.., G, R, K]``; None: all. Arguments as in `add`."""
        mask, row, key = self.mask, rows[..., :, None], keys[..., None, :]
        tests = [index >= 0 for index in (row, key) if bool((index < 0).any())]
        if keep is not None:
            tests.append(keep(row, key))
        if not mask.is_full:
            start, stop = (take(x[:, None, :, None], rows) for x in (mask.start, mask.stop))
            tests += [key >= start, key < stop]
        if mask.key_valid is not None:
            tests.append(take(mask.key_valid[:, None, :, None], keys).transpose(-1, -2))
        if mask.dense is not None:
            batch = torch.arange(mask.dense.shape[0], device=rows.device)
            places = row.clamp(min=0), key.clamp(min=0)
            tests.append(mask.dense[(batch[:, None, None, None, None], *places)])
        seen = None
        for test in tests:
            seen = test if seen is None else seen & test
        return seen

    def count(self, rows: Tensor, logits: Tensor) -> None:
        """Take exactly computed scores of real rows down, if they are counted."""
        if self.tally.entries is None:
            return
        seen = logits > -torch.inf
        if self.mask.query_valid is not None:
            seen = seen & take(self.mask.query_valid[:, None, :, None], rows)
        self.tally.entries += seen.sum((2, 3, 4))

    def values(self, keys: Tensor | None) -> Tensor:
        """Values ``[B, H, G or 1, K, Dv]`` of groups of keys."""
        return self.value[:, :, None] if keys is None else take(self.value, keys)

    def add_scored(self, rows: Tensor, logits: Tensor, values: Tensor) -> None:
        """Scores worked out elsewhere.

        Args:
            rows: As in `add`.
            logits: ``[B, H, G, R, K]``.
            values: ``[B, H, G or 1, K, Dv]``.
        """
        self.add_part(rows, *self.softmax(logits, values))

    def softmax(self, logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Peak, mass and weighted values of scores, as `add_part` takes them."""
        peak = logits.detach().amax(-1)
        weights = torch.exp(logits - finite(peak)[..., None])
        self.tally.products += logits.numel() * (self.query.shape[3] + values.shape[4])
        return peak, weights.sum(-1), weights @ values

    def add_part(self, rows: Tensor, peak: Tensor, mass: Tensor, weighted: Tensor) -> None:
        """Sums of ``exp(logit - peak)``, and of the values that these weigh.

        Args:
            rows: As in `add`.
            peak, mass: ``[B, H, G, R]``.
            weighted: ``[B, H, G, R, Dv]``.
        """
        index = rows.expand(*self._peak.shape[:2], -1, -1).flatten(2)
        peak, mass, weighted = peak.flatten(2), mass.flatten(2), weighted.flatten(2, 3)
        if bool((index < 0).any()):  # no row: adds nothing to row 0
            peak, index = peak.masked_fill(index < 0, -torch.inf), index.clamp(min=0)
        highest = self._peak.scatter_reduce(2, index, peak, "amax")
        base = finite(highest)
        mine, theirs = torch.exp(self._peak - base), torch.exp(peak - base.gather(2, index))
        self._peak = highest
        self._mass = (self._mass * mine).scatter_add(2, index, mass * theirs)
        self._weighted = (self._weighted * mine[..., None]).scatter_add(
            2, index[..., None].expand_as(weighted), weighted * theirs[..., None]
        )

    def lse(self) -> Tensor:
        """Log-sum-exp of what was added so far, ``[B, H, N]``; -inf for rows without any."""
        return self._peak + self._mass.log()

    def output(self) -> Tensor:
        """``[B, H, N, Dv]``. Rows that reached none of the keys they may see get their mean."""
        mass, weighted = self._mass, self._weighted
        if self._sinks is not None:
            sinks = self._sinks.to(mass.dtype)[None, :, None].expand_as(mass)
            base = finite(torch.maximum(self._peak, sinks))
            shrink = torch.exp(self._peak - base)
            mass, weighted = mass * shrink + torch.exp(sinks - base), weighted * shrink[..., None]
        lost = self._mass == 0
        output = weighted / mass.masked_fill(lost, 1.0)[..., None]
        if bool(lost.any()):
            output = torch.where(lost[..., None], visible_mean(self.value, self.mask), output)
        return for_blind_rows(output, self.value, self.mask, self._sinks)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """``[B or 1, H or 1, L, D]`` at positions ``[B or 1, H or 1, G, K]``: ``[.., G, K, D]``.

    Position -1 gives token 0.
    """
    index = index.clamp(min=0)
    if index.shape[:2] == (1, 1):
        return tokens[:, :, index[0, 0]]
    sizes = [max(a, b) for a, b in zip(tokens.shape[:2], index.shape[:2], strict=True)]
    flat = index.expand(*sizes, -1, -1).flatten(2)[..., None].expand(-1, -1, -1, tokens.shape[3])
    return tokens.expand(*sizes, -1, -1).gather(2, flat).unflatten(2, index.shape[2:])


def groups(n_tokens: int, size: int, device: torch.device) -> Tensor:
    """All positions in runs of ``size``, int64 ``[1, 1, G, size]``, -1 after the last."""
    index = torch.arange(-(-n_tokens // size) * size, device=device)
    return index.masked_fill(index >= n_tokens, -1).view(1, 1, -1, size)


def runs(n_tokens: int, most: int, device: torch.device) -> Tensor:
    """All positions in runs of at most ``most``: `groups` for want of any structure."""
    return groups(n_tokens, -(-n_tokens // -(-n_tokens // most)), device)


def finite(peak: Tensor) -> Tensor:
    """Peaks that can be subtracted: 0 for those of nothing."""
    return peak.masked_fill(peak == -torch.inf, 0.0)


def visible_mean(value: Tensor, mask: AttentionMask) -> Tensor:
    """Mean of the values that each row may see, ``[B, H, N, Dv]``; zeros for rows that see none.

    Args:
        value: ``[B, H, M, Dv]``.
    """
    counts = mask.legal_per_row().clamp(min=1)[:, None, :, None]
    if mask.dense is not None:
        step = max(1, _FLOATS_IN_FLIGHT // mask.n_keys)
        sums = [
            mask.rows(first, first + step)[:, None].to(value.dtype) @ value
            for first in range(0, mask.n_queries, step)
        ]
        return torch.cat(sums, 2) / counts
    if mask.key_valid is not None:
        value = value * mask.key_valid[:, None, :, None]
    shape = (value.shape[0], value.shape[1], mask.n_queries, value.shape[3])
    if bool((mask.stop - mask.start == mask.n_keys).all()):
        return (value.sum(2, keepdim=True) / counts).expand(shape).to(value.dtype)
    before = torch.nn.functional.pad(value.double().cumsum(2), (0, 0, 1, 0))
    start, stop = (take(before, x[:, None, None])[:, :, 0] for x in (mask.start, mask.stop))
    return ((stop - start) / counts).to(value.dtype)
