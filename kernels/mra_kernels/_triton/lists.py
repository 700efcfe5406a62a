"""From bits to lists: what a tile reads, in the order in which it reads it."""

from __future__ import annotations

import triton
import triton.language as tl

from mra_kernels._triton.primitives import ROW_FACTS, WHOLE_FIRST, WHOLE_STOP

WHO = tl.constexpr(23)
"""An entry is a key block, and above this bit which rows of blocks of the tile opened it."""
BLOCK = tl.constexpr((1 << 23) - 1)


@triton.jit
def _write(LIST, block, who, plain, STEP: tl.constexpr):
    """Writes the entries of blocks that anybody opened, a multiple of ``STEP`` of the plain ones
    first. The barriers keep the threads of the program together.

    Returns:
        How many are plain, and how many there are.
    """
    opened = who != 0
    plain = plain & opened
    n_plain = tl.sum(plain.to(tl.int32), 0) // STEP * STEP
    place = tl.cumsum(plain.to(tl.int32), 0) - 1
    first = plain & (place < n_plain)
    rest = opened & (first == 0)
    place = tl.where(first, place, n_plain + tl.cumsum(rest.to(tl.int32), 0) - 1)
    tl.debug_barrier()
    tl.store(LIST + place, block | (who << WHO), mask=opened)
    tl.debug_barrier()
    return n_plain, tl.sum(opened.to(tl.int32), 0)


@triton.jit
def list_keys(
    LIST, OPEN, ROWS, KEYS, first_row, part_0, rows, cols, words,
    SIDE: tl.constexpr, PART: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Lists, from ``part_0`` on, parts of ``PART`` keys of the blocks that any of ``TILE_ROWS``
    rows of blocks opened; plain are those that need no mask at all: opened by all rows, whole for
    all, full of real keys.

    Returns:
        How many are plain, and how many there are.
    """
    part = part_0 + tl.arange(0, CHUNK)
    col = part // (SIDE // PART)
    there = col < cols
    plain = tl.load(KEYS + col, mask=there, other=0) == SIDE
    who = tl.zeros([CHUNK], tl.int32)
    for each in tl.static_range(TILE_ROWS):
        # Beyond the last row, that one again: it changes nothing.
        row = tl.minimum(first_row + each, rows - 1).to(tl.int64)
        word = tl.load(OPEN + row * words + col // 32, mask=there, other=0)
        bit = (word >> (col % 32)) & 1
        whole_first = tl.load(ROWS + row * ROW_FACTS + WHOLE_FIRST)
        whole_stop = tl.load(ROWS + row * ROW_FACTS + WHOLE_STOP)
        plain = plain & (bit == 1) & (col >= whole_first) & (col < whole_stop)
        who += bit << each
    return _write(LIST, part, who, plain, STEP)


@triton.jit
def list_queries(
    LIST, OPEN, ROWS, KEYS, first_col, part_0, cols, words, n,
    QUERY_ROWS: tl.constexpr, PART: tl.constexpr, SIDE: tl.constexpr, TILE_COLS: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """`list_keys` the other way round: parts of ``PART`` queries of the rows of blocks that opened
    any of ``TILE_COLS`` columns."""
    part = part_0 + tl.arange(0, CHUNK)
    there = part * PART < n
    row = (part * PART // QUERY_ROWS).to(tl.int64)
    whole_first = tl.load(ROWS + row * ROW_FACTS + WHOLE_FIRST, mask=there, other=0)
    whole_stop = tl.load(ROWS + row * ROW_FACTS + WHOLE_STOP, mask=there, other=0)
    plain = (part + 1) * PART <= n
    who = tl.zeros([CHUNK], tl.int32)
    for each in tl.static_range(TILE_COLS):
        col = tl.minimum(first_col + each, cols - 1)
        word = tl.load(OPEN + row * words + col // 32, mask=there, other=0)
        bit = (word >> (col % 32)) & 1
        real = tl.load(KEYS + col) + tl.zeros([CHUNK], tl.int32)
        plain = plain & (bit == 1) & (real == SIDE) & (col >= whole_first) & (col < whole_stop)
        who += bit << each
    return _write(LIST, part, who, plain, STEP)


@triton.jit
def entries_of(LIST, at, stop, STEP: tl.constexpr):
    """The next ``STEP`` entries, 1, 2 or 4, as scalars; 0, opened by nobody, beyond the end."""
    a = tl.load(LIST + at, mask=at < stop, other=0)
    b = a
    c = a
    d = a
    if STEP > 1:
        b = tl.load(LIST + at + 1, mask=at + 1 < stop, other=0)
    if STEP > 2:
        c = tl.load(LIST + at + 2, mask=at + 2 < stop, other=0)
        d = tl.load(LIST + at + 3, mask=at + 3 < stop, other=0)
    return a, b, c, d


@triton.jit
def entry_of_tokens(a, b, c, d, SIDE: tl.constexpr, BN: tl.constexpr):
    """Which entry each of ``BN`` tokens belongs to, int32 ``[BN]``; one scalar if all the same."""
    which = tl.arange(0, BN) // SIDE
    if SIDE == BN:
        return a
    elif SIDE * 2 == BN:
        return tl.where(which == 0, a, b)
    else:
        return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))


@triton.jit
def rows_at(
    base, entry, stride, SIDE: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr,
    TIGHT: tl.constexpr,
):  # fmt: skip
    """Pointers ``[BN, DP]`` to the tokens of blocks; `entry_of_tokens` says of which.

    Offsets within a block stay in registers during a loop, unless those are ``TIGHT``: an
    instruction or two more for each row that a thread loads.
    """
    lane = tl.arange(0, BN)
    d = tl.arange(0, DP)
    if TIGHT:
        token = tokens_of(entry, SIDE, BN).to(tl.int64)
        return base + (token * stride)[:, None] + d[None, :]
    block = ((entry & BLOCK) * SIDE).to(tl.int64) * stride
    if SIDE == BN:
        return base + block + (lane * stride)[:, None] + d[None, :]
    else:
        return base + (block + lane % SIDE * stride)[:, None] + d[None, :]


@triton.jit
def load_tokens(
    base, entry, stride, n, SIDE: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, WHOLE: tl.constexpr, TIGHT: tl.constexpr = False,
):  # fmt: skip
    """Tokens of blocks, ``[BN, DP]``; 0 beyond the last of ``n``, unless all are ``WHOLE``."""
    at = rows_at(base, entry, stride, SIDE, BN, DP, TIGHT)
    d = tl.arange(0, DP)
    if WHOLE and D == DP:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        inside = tokens_of(entry, SIDE, BN) < n
        return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def tokens_of(entry, SIDE: tl.constexpr, BN: tl.constexpr):
    """Positions of the tokens of blocks, int32 ``[BN]``."""
    return (entry & BLOCK) * SIDE + tl.arange(0, BN) % SIDE


@triton.jit
def visible_keys(
    entry, begin, stop, local, KEY_VALID, m, SIDE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Which keys each query sees and its row of blocks opened, ``[BM, BN]``.

    ``local`` is each query's row of blocks within the tile, None if they share one; ``begin`` and
    ``stop`` are its interval.
    """
    key = tokens_of(entry, SIDE, BN)
    if local is None:  # entries beyond the end of a list are nobody's
        key = tl.where(entry >> WHO == 0, -1, key)
    visible = (key[None, :] >= begin[:, None]) & (key[None, :] < stop[:, None])
    if local is not None:
        if SIDE == BN:
            visible = visible & (((entry >> (local + WHO)) & 1) == 1)[:, None]
        else:
            visible = visible & (((entry[None, :] >> (local + WHO)[:, None]) & 1) == 1)
    if KEY_VALID is not None:
        real = tl.load(KEY_VALID + key, mask=(key >= 0) & (key < m), other=0) != 0
        visible = visible & real[None, :]
    return visible
