"""The part of ``kernels/PREDICTIONS.md`` that is about ``mra``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from triton_static.compiled import Compiled
from triton_static.keys_model import FEATURE_OPS, LISTING, ROWS, Parts, forward
from triton_static.model import GPUS, HEADS, Call, Gpu, dense_ms

LENGTHS = [1024 << i for i in range(8)]
CALLS = [(64, False), (64, True), (128, False)]
"""Width, and whether causal."""


def section(rows: Mapping[str, Compiled]) -> str:
    """Verdict, tables, where the time goes."""
    return "\n".join([_HEAD, _verdict(rows), *_table(rows), *_breakdown(rows), _notes()])


def _kernels(rows: Mapping[str, Compiled], gpu: Gpu, width: int) -> dict[str, Compiled]:
    """What no width changes is compiled at 64 alone."""
    found = {}
    for name in ("mra d64", f"mra d{width}"):
        prefix = f"{gpu.architecture} {name} "
        found |= {k.removeprefix(prefix): v for k, v in rows.items() if k.startswith(prefix)}
    return found


def _times(rows: Mapping[str, Compiled], gpu: Gpu, call: Call) -> tuple[float, float]:
    """Milliseconds, and how many times as fast as dense attention."""
    ms = forward(gpu, call, _kernels(rows, gpu, call.width)).total
    return ms, dense_ms(gpu, call.n, call.width, call.causal) / ms


def _verdict(rows: Mapping[str, Compiled]) -> str:
    lines = []
    for name, gpu in GPUS.items():
        best = max(
            _times(rows, gpu, Call(n, width, 0.1, causal))[1]
            for n in LENGTHS
            for width, causal in CALLS
        )
        answer = "yes" if best > 1 else "**no**"
        lines.append(f"- Faster than dense attention on {name}, at 10 %? {answer}: {best:.2g} ")
        lines[-1] += "times as fast at best."
    return "\n".join(lines)


def _table(rows: Mapping[str, Compiled]) -> list[str]:
    titles = [f"{width}{', causal' if causal else ''}" for width, causal in CALLS]
    lines = []
    for name, gpu in GPUS.items():
        cells = [f"{title}: dense | 10 %" for title in titles]
        lines += ["", "| ".join([f"| {name}: N ", *(f"{c} " for c in cells)]) + "|"]
        lines.append("|" + " ---: |" * (2 * len(CALLS) + 1))
        for n in LENGTHS:
            row = [f"{n // 1024}k"]
            for width, causal in CALLS:
                ms, times = _times(rows, gpu, Call(n, width, 0.1, causal))
                row += [f"{dense_ms(gpu, n, width, causal):.3g}", f"{ms:.3g} ({times:.2g}x)"]
            lines.append("| " + " | ".join(row) + " |")
    return lines


def _breakdown(rows: Mapping[str, Compiled]) -> list[str]:
    names = [field.name for field in fields(Parts)]
    lines = ["", "16k, 10 %, no mask:", "", "| | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for name, gpu in GPUS.items():
        for width in (64, 128):
            parts = forward(gpu, Call(16384, width, 0.1), _kernels(rows, gpu, width))
            cells = [f"{getattr(parts, part):.3g}" for part in names]
            lines.append(f"| {name}, width {width} | " + " | ".join(cells) + " |")
    return lines


def _notes() -> str:
    memory = "\n".join(f"  - at {n // 1024}k {_memory(n)}." for n in (16384, 131072))
    return _NOTES.format(ops=FEATURE_OPS, listing=LISTING, heads=HEADS, memory=memory)


def _memory(n: int) -> str:
    """Of all heads: a bit per block and key, counts of 128 distances and a list per block."""
    blocks = HEADS * n // ROWS
    parts = {"bits": blocks * n / 8, "counts": blocks * 128 * 4, "lists": blocks * (1024 + 64) * 4}
    return ", ".join(f"{size / 1e6:.0f} MB of {name}" for name, size in parts.items())


_HEAD = """
## `mra`: single keys

Milliseconds of a forward pass, and how many times as fast as dense attention, by the same model.
"""

_NOTES = """
- Estimating every key for every block of 16 queries takes as long as dense attention: products of
  bytes are cheap on tensor cores, but turning them into distances and counting those are ordinary
  instructions, for all pairs of a key and a block, twice.
- Features are {ops} operations of torch, counted: a launch each, most of them of the orthogonal
  iteration that stands in for eigenvectors (torch works those out one head after another, in 1.8 ms
  each as others measured, pytorch/pytorch issue 174674), and bytes at 80 % of the memory's rate.
- Opened keys are gathered one by one for 16 queries: bound by the L2 cache. Listing those of 1024
  keys takes {listing} instructions a warp.
- What the kernels are for: no N x N matrix, where plain torch makes several. What remains, for
  {heads} heads:
{memory}
- Blocks in the thousands are needed to fill a GPU; with few queries each head has one program."""
