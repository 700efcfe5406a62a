"""Which keys each query row may see, without an N x M matrix.

Causal, sliding-window, chunked, packed and prefix masks all let a row see one interval of keys;
key padding takes some keys away for every row. That is what `AttentionMask` stores: O(N + M)
numbers. A boolean matrix is kept only for masks that have no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mra_kernels.pyramid import each_row

Fact = TypeVar("Fact")


class BlockFacts(NamedTuple):
    """What a mask says of blocks of one shape.

    Attributes:
        n_queries, n_keys: Queries and real keys per block, int64 ``[B, blocks]``, see
            `AttentionMask.block_sizes`.
        log_keys: Logarithm of ``n_keys``, float32.
        entries: Legal entries of each row of blocks, int64 ``[B, rows]``.
        padding: Rows of blocks without a real query, bool ``[B, rows]``.
        first_row, first_col: First blocks with a real token, int64 ``[B]``.
    """

    n_queries: Tensor
    n_keys: Tensor
    log_keys: Tensor
    entries: Tensor
    padding: Tensor
    first_row: Tensor
    first_col: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Query row ``i`` sees key ``j`` iff ``start[i] <= j < stop[i]``, ``key_valid[j]`` and, where a
    matrix is given, ``dense[i, j]``.

    Attributes:
        start: First visible key, int64 ``[B or 1, N]``.
        stop: One past the last visible key, int64 ``[B or 1, N]``.
        n_keys: M.
        key_valid: False for padding, bool ``[B or 1, M]``; None: all valid.
        query_valid: False for padding rows, bool ``[B or 1, N]``; None: all valid. Such rows are
            computed like others (convolutions after attention may read them), but stay out of
            pooled queries, of other rows' budget and of every error figure.
        dense: Escape hatch for masks that are not intervals, bool ``[B or 1, N, M]``.
        query_offset: Position of query row 0 among the keys (a KV cache shifts it).
    """

    start: Tensor
    stop: Tensor
    n_keys: int
    key_valid: Tensor | None = None
    query_valid: Tensor | None = None
    dense: Tensor | None = None
    query_offset: int = 0

    # --- constructors -------------------------------------------------------------------------

    @classmethod
    def full(
        cls, n_queries: int, n_keys: int, *, device: torch.device | str = "cpu"
    ) -> AttentionMask:
        """Every query sees every key."""
        start = torch.zeros(1, n_queries, dtype=torch.int64, device=device)
        return cls(start, start + n_keys, n_keys)

    @classmethod
    def causal(
        cls,
        n_queries: int,
        n_keys: int | None = None,
        *,
        offset: int | None = None,
        window: int | None = None,
        chunk: int | None = None,
        device: torch.device | str = "cpu",
    ) -> AttentionMask:
        """Row ``i`` sees keys up to its own position ``offset + i`` (default: the last rows align).

        Args:
            window: Sees only the last ``window`` keys, its own included.
            chunk: Sees only keys of its own chunk of ``chunk`` positions.
        """
        n_keys = n_queries if n_keys is None else n_keys
        offset = n_keys - n_queries if offset is None else offset
        position = torch.arange(n_queries, device=device)[None] + offset
        start = torch.zeros_like(position)
        if window is not None:
            start = (position - window + 1).clamp(min=0)
        if chunk is not None:
            start = torch.maximum(start, position // chunk * chunk)
        stop = (position + 1).clamp(0, n_keys)
        return cls(torch.minimum(start, stop), stop, n_keys, query_offset=offset)

    @classmethod
    def from_dense(cls, visible: Tensor, *, query_offset: int = 0) -> AttentionMask:
        """From a boolean ``[B or 1, N, M]`` matrix (True: visible).

        The matrix is dropped where intervals and key padding say the same.
        """
        n_keys = visible.shape[-1]
        some, marks = visible.any(-1), visible.to(torch.uint8)
        start = marks.argmax(-1) * some
        stop = (n_keys - marks.flip(-1).argmax(-1)) * some
        valid = visible.any(-2)
        key_valid = None if bool(valid.all()) else valid
        if key_valid is not None:  # an interval may as well reach over padding
            before = torch.nn.functional.pad(valid.long().cumsum(-1), (1, 0))
            start = start * (before.gather(1, start) > 0)
            stop = stop.masked_fill((before.gather(1, stop) == before[:, -1:]) & some, n_keys)
        intervals = cls(start, stop, n_keys, key_valid, query_offset=query_offset)
        if bool((intervals.rows(0, start.shape[1]) == visible).all()):
            return intervals
        return replace(intervals, dense=visible)

    def with_padding(
        self, key_valid: Tensor | None, query_valid: Tensor | None = None
    ) -> AttentionMask:
        """The same mask with padding: bool ``[B, M]`` keys and bool ``[B, N]`` queries."""
        return replace(self, key_valid=key_valid, query_valid=query_valid)

    # --- what it is ---------------------------------------------------------------------------

    @property
    def n_queries(self) -> int:
        return self.start.shape[1]

    @cached_property
    def is_full(self) -> bool:
        """No query is kept from any key."""
        return (
            self.key_valid is None
            and self.dense is None
            and bool((self.start == 0).all())
            and bool((self.stop == self.n_keys).all())
        )

    @cached_property
    def is_causal(self) -> bool:
        """Most rows with keys behind their own position see none of them."""
        own = torch.arange(self.n_queries, device=self.stop.device) + self.query_offset + 1
        matters = (self.stop > self.start) & (own < self.n_keys)
        return bool((matters & (self.stop <= own)).sum() * 2 > matters.sum())

    @cached_property
    def is_plain_causal(self) -> bool:
        """Causal over a square with nothing else: torch's ``is_causal=True``."""
        own = torch.arange(self.n_queries, device=self.stop.device) + 1
        return (
            self.n_queries == self.n_keys
            and self.key_valid is None
            and self.dense is None
            and bool((self.start == 0).all())
            and bool((self.stop == own).all())
        )

    @cached_property
    def window(self) -> int | None:
        """The most keys any row can see, where the mask hides far keys from some row."""
        if int(self.start.max()) == 0:
            return None
        return int(self.legal_per_row().max())

    @cached_property
    def blind_rows(self) -> Tensor | None:
        """Rows that may see no key at all, bool ``[B or 1, N]``; None: there are none."""
        blind = self.legal_per_row() == 0
        return blind if bool(blind.any()) else None

    def legal_per_row(self) -> Tensor:
        """Visible keys of each row, int64 ``[B or 1, N]``."""
        if self.dense is not None:
            return self.rows(0, self.n_queries).sum(-1)
        return self._between(self.start, self.stop)

    # --- tiles --------------------------------------------------------------------------------

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` as a boolean ``[B or 1, last - first, M]`` matrix."""
        key = torch.arange(self.n_keys, device=self.start.device)
        start, stop = self.start[:, first:last, None], self.stop[:, first:last, None]
        visible = (key >= start) & (key < stop)
        if self.key_valid is not None:
            visible = visible & self.key_valid[:, None]
        if self.dense is not None:
            visible = visible & self.dense[:, first:last]
        return visible

    def tiles(
        self, batch: Tensor, row: Tensor, col: Tensor, side: int, query_rows: int | None = None
    ) -> Tensor:
        """Visible entries of block pairs, bool ``[P, query_rows, side]``.

        Args:
            batch, row, col: Batch index and block coordinates of each pair, int64 ``[P]``.
            side: Columns of a block. Entries beyond N or M are False.
            query_rows: Rows of a block; None: ``side``.
        """
        query, query_ok, start, stop = self._block_rows(batch, row, query_rows or side)
        key = col[:, None] * side + torch.arange(side, device=col.device)
        visible = (key[:, None] >= start[..., None]) & (key[:, None] < stop[..., None])
        visible &= query_ok[..., None]
        inside = key.clamp(max=self.n_keys - 1)
        if self.key_valid is not None:
            of = _index(batch, self.key_valid.shape[0])
            visible &= self.key_valid[of[:, None], inside][:, None]
        if self.dense is not None:
            of = _index(batch, self.dense.shape[0])
            visible &= self.dense[of[:, None, None], query[..., None], inside[:, None]]
        return visible

    def tile_row_counts(
        self, batch: Tensor, row: Tensor, col: Tensor, side: int, query_rows: int | None = None
    ) -> Tensor:
        """Visible keys of each row of each pair, int64 ``[P, query_rows]``. Arguments as in
        `tiles`."""
        if self.dense is not None:
            return self.tiles(batch, row, col, side, query_rows).sum(-1)
        _, inside, start, stop = self._block_rows(batch, row, query_rows or side)
        first = (col * side)[:, None]
        low, high = torch.maximum(start, first), torch.minimum(stop, first + side)
        return self._between(low, high, batch) * inside

    def tile_counts(
        self, batch: Tensor, row: Tensor, col: Tensor, side: int, query_rows: int | None = None
    ) -> Tensor:
        """Visible entries of each block pair, int64 ``[P]``. Arguments as in `tiles`."""
        step = max(1, (1 << 22) // (query_rows or side))  # bounds the temporary to a few tens of MB
        parts = [
            self.tile_row_counts(b, r, c, side, query_rows).sum(-1)
            for b, r, c in zip(batch.split(step), row.split(step), col.split(step), strict=True)
        ]
        return torch.cat(parts) if parts else batch.new_zeros(0)

    def block_sizes(
        self, side: int, batch_size: int, query_rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries and real keys per block: two int64 ``[B, blocks]`` tensors.

        Padding queries count, unless they see nothing.

        Args:
            side, query_rows: As in `tiles`.
        """
        device = self.start.device
        queries = torch.ones(1, self.n_queries, dtype=torch.int64, device=device)
        if self.query_valid is not None:
            queries = (self.query_valid | (self.legal_per_row() > 0)).long()
        keys = torch.ones(1, self.n_keys, dtype=torch.int64, device=device)
        keys = keys if self.key_valid is None else self.key_valid.long()
        return (
            _block_sum(queries, query_rows or side).expand(batch_size, -1),
            _block_sum(keys, side).expand(batch_size, -1),
        )

    def pooled_tokens(self, query_rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Which queries and keys count in block means, bool ``[B or 1, N]`` and ``[B or 1, M]``.

        Real ones do (None: all); in blocks of ``query_rows`` padding queries alone, all do, for
        want of better.
        """
        queries = self.query_valid
        if queries is not None:
            alone = self.padding_rows(query_rows, queries.shape[0])
            queries = queries | each_row(alone[:, None], queries[:, None], query_rows)[:, 0]
        return queries, self.key_valid

    def padding_rows(self, query_rows: int, batch_size: int) -> Tensor:
        """Rows of blocks without a single real query, bool ``[B, blocks]``."""
        if self.query_valid is None:
            shape = (batch_size, -(-self.n_queries // query_rows))
            return torch.zeros(shape, dtype=torch.bool, device=self.start.device)
        return (_block_sum(self.query_valid.long(), query_rows) == 0).expand(batch_size, -1)

    def block_row_entries(self, query_rows: int, batch_size: int) -> Tensor:
        """Legal entries of each row of blocks, int64 ``[B, blocks]``."""
        legal = self.legal_per_row().expand(batch_size, -1)
        return _block_sum(legal, query_rows)

    @property
    def real_before(self) -> Tensor | None:
        """How many real keys stand before each key, int64 ``[B or 1, M + 1]``; None: all real."""
        valid = self.key_valid
        if valid is None:
            return None
        return self.kept(
            "real_before", lambda: torch.nn.functional.pad(valid.long().cumsum(-1), (1, 0))
        )

    def blocks(self, side: int, batch_size: int, query_rows: int | None = None) -> BlockFacts:
        """All that a block shape and the mask say of each other; kept for the next call."""
        rows = query_rows or side

        def made() -> BlockFacts:
            n_queries, n_keys = self.block_sizes(side, batch_size, rows)
            padding = self.padding_rows(rows, batch_size)
            return BlockFacts(
                n_queries.contiguous(),
                n_keys.contiguous(),
                n_keys.float().log(),
                self.block_row_entries(rows, batch_size).contiguous(),
                padding.contiguous(),
                (~padding).int().argmax(1),
                (n_keys > 0).int().argmax(1),
            )

        return self.kept(("blocks", side, rows, batch_size), made)

    # --- helpers ------------------------------------------------------------------------------

    def kept(self, name: Hashable, make: Callable[[], Fact]) -> Fact:
        """What ``make`` finds out about the mask, kept for the next call; not by torch.compile,
        torch.export and captures of CUDA graphs, whose tensors end with them."""
        if torch.compiler.is_compiling() or captured(self.start):
            return make()
        # No `cached_property`: in Python 3.11 it takes a lock, which torch.compile can't trace.
        facts: dict[Hashable, Any] = self.__dict__.setdefault("_kept", {})
        if name not in facts:
            with torch.inference_mode(False):  # a later call may train
                facts[name] = make()
        fact: Fact = facts[name]
        return fact

    def _block_rows(
        self, batch: Tensor, row: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query = row[:, None] * rows + torch.arange(rows, device=row.device)
        inside = query < self.n_queries
        query = query.clamp(max=self.n_queries - 1)
        of = _index(batch, self.start.shape[0])[:, None]
        return query, inside, self.start[of, query], self.stop[of, query]

    def _between(self, low: Tensor, high: Tensor, batch: Tensor | None = None) -> Tensor:
        """Valid keys in ``[low, high)``; ``batch``: the batch index of each row, if they mix."""
        if self.key_valid is None:
            return (high - low).clamp(min=0)
        prefix = self.real_before
        assert prefix is not None
        high = torch.maximum(low, high).clamp(max=self.n_keys)
        low = low.clamp(max=self.n_keys)
        if batch is None:
            entries = max(prefix.shape[0], low.shape[0])
            prefix, low, high = (x.expand(entries, -1) for x in (prefix, low, high))
            return prefix.gather(1, high) - prefix.gather(1, low)
        of = _index(batch, prefix.shape[0])[:, None]
        return prefix[of, high] - prefix[of, low]


def captured(tensor: Tensor) -> bool:
    """Whether what is done with ``tensor`` now becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _index(batch: Tensor, size: int) -> Tensor:
    return batch if size > 1 else torch.zeros_like(batch)


def _block_sum(values: Tensor, side: int) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % side))
    return padded.unflatten(1, (-1, side)).sum(-1)
