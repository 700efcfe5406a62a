"""Writes ``kernels/PREDICTIONS.md`` from ``baseline.json``.

``python tests/triton_static/predict.py``
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from mra_kernels._triton.threshold import CANDIDATES
from triton_static.baseline import baseline
from triton_static.compiled import Compiled
from triton_static.keys_page import section
from triton_static.model import (
    DERATE,
    GPUS,
    HEADS,
    LAUNCH_MS,
    LONE_CYCLES,
    TURNS,
    Call,
    Gpu,
    break_even,
    dense_ms,
    forward,
    more_sweeps,
    tile_cycles,
)

PAGE = Path(__file__).parents[2] / "kernels" / "PREDICTIONS.md"
LENGTHS = [1024 << i for i in range(8)]
BUDGETS = (0.05, 0.1, 0.25)
SWEEPS = {"threshold": 2, "alone": 1, "open": 1}
"""How often a head's pairs of blocks are scored; the executor counts the same (a test)."""
DISJOINT = 0.53
"""Of the blocks a tile of 64 queries opens, how many each of its two rows of blocks of 32 opened,
on normal noise at 10 %: close to the worst, a half."""


def page() -> str:
    """The page."""
    parts = [_HEAD, _aims()]
    for causal in (False, True):
        for name, gpu in GPUS.items():
            for width in (64, 128):
                parts.append(_table(name, gpu, kernels_of(name, width), width, causal))
    parts += [_breakdown(), _assumptions(), section(baseline()[1]), ""]
    return "\n".join(parts)


def kernels_of(gpu: str, width: int) -> dict[str, Compiled]:
    """What the baseline has of a GPU and a width, by case and kernel."""
    _, rows = baseline()
    prefix = f"{GPUS[gpu].architecture} d{width} "
    return {k.removeprefix(prefix): v for k, v in rows.items() if k.startswith(prefix)}


def _speed(gpu: Gpu, call: Call, kernels: dict[str, Compiled]) -> tuple[float, float]:
    """Milliseconds, and how many times as fast as dense attention."""
    ms = forward(gpu, call, kernels, SWEEPS).total
    return ms, dense_ms(gpu, call.n, call.width, call.causal) / ms


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(name: str, gpu: Gpu, kernels: dict[str, Compiled], width: int, causal: bool) -> str:
    lines = [f"\n### {name}, width {width}, {'causal' if causal else 'no mask'}\n"]
    columns = ["N", "dense"] + [f"{b * 100:.0f} %" for b in BUDGETS]
    columns += ["10 %, blocks of 32", "10 %, 128 queries x 32 keys"]
    lines += ["| " + " | ".join(columns) + " |", "|" + " ---: |" * len(columns)]
    for n in LENGTHS:
        cells = [f"{n // 1024}k", _ms(dense_ms(gpu, n, width, causal))]
        calls = [Call(n, width, budget, causal) for budget in BUDGETS]
        calls += [Call(n, width, 0.1, causal, 32, DISJOINT)]
        calls += [Call(n, width, 0.1, causal, 32, query_rows=128)]
        for call in calls:
            ms, times = _speed(gpu, call, kernels)
            cells.append(f"{_ms(ms)} ({times:.2g}x)")
        lines.append("| " + " | ".join(cells) + " |")
    lengths = (break_even(gpu, Call(0, width, b, causal), kernels, SWEEPS) for b in BUDGETS)
    shown = ", ".join(
        f"{length or 'none up to 128k'} at {budget * 100:.0f} %"
        for length, budget in zip(lengths, BUDGETS, strict=True)
    )
    return "\n".join([*lines, "", f"Break-even length: {shown}."])


def _aims() -> str:
    gpu = GPUS["H100"]
    kernels = kernels_of("H100", 64)
    times = _speed(gpu, Call(16384, 64, 0.1), kernels)[1]
    wide = _speed(gpu, Call(16384, 64, 0.1, side=32, query_rows=128), kernels)[1]
    length = break_even(gpu, Call(0, 64, 0.1), kernels, SWEEPS)
    reached = "met" if times >= 4 else "not met"
    short = "met" if length is not None and length <= 1024 else "not met"
    return (
        "\n## The aims\n\nOn an H100 at width 64 and a budget of 10 %, in this model: "
        f"4 times dense attention at 16k: **{reached}** ({times:.2f} times; {wide:.2f} where tiles "
        "of 128 queries share a list of blocks of 32 keys, which gets past the L2 cache's bound). "
        f"Break-even at 1k or below: **{short}** ({length}).\n\n## Tables\n\n"
        "Milliseconds of a forward pass, and how many times as fast as dense attention."
    )


def _breakdown() -> str:
    lines = ["\n## Where the time goes: 16k, 10 %, no mask\n"]
    lines += ["| | pool | threshold | open | attend | a tile is bound by |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for name, gpu in GPUS.items():
        for width in (64, 128):
            kernels = kernels_of(name, width)
            parts = forward(gpu, Call(16384, width, 0.1), kernels, SWEEPS)
            units, cycles = tile_cycles(gpu, kernels["forward_kernel"], width)
            bound = max(units, key=lambda unit: units[unit])
            peak = units["tensor cores"] / cycles
            cells = [_ms(x) for x in (parts.pool, *parts.choose, parts.attend)]
            cells.append(f"{bound}, {peak:.0%} of the tensor cores' peak")
            lines.append(f"| {name}, width {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _assumptions() -> str:
    facts = []
    for name in GPUS:
        for width in (64, 128):
            kernels = kernels_of(name, width)
            for kind in ("forward_kernel", "shared forward_kernel"):
                if kind not in kernels:
                    continue
                kernel = kernels[kind]
                facts.append(
                    f"{name}, width {width}: {kernel.constants['BM']} x {kernel.constants['BN']}, "
                    f"{kernel.warps} warps, {kernel.loop} instructions per step, "
                    f"{kernel.registers} registers, {kernel.programs} programs per multiprocessor"
                )
    rates = "; ".join(
        f"{name}: {gpu.memory / 1e12:.3g} TB/s memory, {gpu.cache / 1e12:.3g} TB/s L2 cache, "
        f"{gpu.units} multiprocessors at {gpu.clock / 1e9:.3g} GHz"
        for name, gpu in GPUS.items()
    )
    return _ASSUMPTIONS.format(
        derate=DERATE,
        launch=LAUNCH_MS * 1e3,
        lone=LONE_CYCLES,
        turns=TURNS,
        candidates=CANDIDATES,
        again=", ".join(
            f"{more} time{'s' * (more > 1)} at {n >> 10}k"
            for n in LENGTHS
            if (more := more_sweeps(Call(n, 64, 0.1)))
        ),
        heads=HEADS,
        disjoint=DISJOINT,
        rates=rates,
        facts="\n".join(f"- {fact}." for fact in facts),
        **SWEEPS,
    )


_HEAD = """# Predictions: the Triton kernels on GPUs

**Predicted, not run on a GPU.** What compilers make of the kernels is known
(`tests/triton_static/baseline.json`), how much they load and how often they score blocks is counted
(`tests/test_triton_counts.py`); the rest is a model on paper. The page is written by
`python tests/triton_static/predict.py`, and a test compares it with what that prints."""

_ASSUMPTIONS = """
## Assumptions

- `mra2`'s forward pass: bfloat16, coarse term `pooled`, blocks compete within a head; blocks of 64
  unless said otherwise, {heads} heads in all, each with its own keys. Four launches of
  {launch:.0f} us, three where one program holds all pairs of blocks of a head. Tables of the mask,
  which torch works out once per mask, and Python are not counted.
- Blocks of 32: a tile of 64 queries reads what either of its two rows of blocks opened; on noise
  they share little ({disjoint:.0%} of what it reads is what each opened). Real heads share more.
- 128 queries x 32 keys (`query_rows=128`): all queries of a tile of 128 share one list. On the A100
  at width 64 tiles stay at 64 queries, which tensor cores bound there.
- A step costs the busiest of tensor cores, instruction issue, exponentials and L2 cache, plus what
  they can't overlap, over the programs that share a multiprocessor; and {derate} of that bound is
  reached, which is what a dense Triton kernel reaches of its own: by the same rule it has bounds of
  604 and 627 TFLOP/s on an H100 at widths 64 and 128, and 403 and 395 were published.
- A head's pairs of blocks are scored {threshold} times by all its programs and {alone} time by the
  last of them, alone, at {lone:.0f} cycles per instruction; then {open} time to open them. The last
  one scores them again where over {candidates} share the leading bits of the score sought: on
  normal noise {again}. It searches those in {turns} turns, as in short sequences a program does
  that scores a head's pairs once, all at that rate.
- Dense attention: FlashAttention-3's published rates on the H100, FlashAttention-2's on the A100
  (read off plots; causal width 128 and the A100 are approximate).
- {rates}. Rates of caches are estimates: the largest doubt of this page.
- The backward pass and decoding are not modelled.

The kernel that takes most of the time, as compiled:

{facts}
"""


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
