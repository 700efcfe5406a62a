"""The tables of `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from mra_cli.calibrate.calibrate import CalibrateReport


def blocks(done: CalibrateReport, model: str) -> Iterator[Table | tuple[str, str]]:
    """What to print, top to bottom: tables, and lines with their style."""
    header = done.header
    length = f"{header['length']} tokens of " if header["length"] else ""
    yield f"{header['method']} fitted to {header['model']}", "bold"
    yield (
        f"{header['samples']} x {length}{header['inputs']}, a quarter of them held out; all "
        f"figures are of those; seed {header['seed']}",
        "dim",
    )
    if any("curves" in found for found in header["sites"].values()):
        yield _curves(header)
    else:
        yield _errors(header)
    if done.resumed:
        yield f"{done.resumed} sites had been fitted before, by an interrupted run.", "dim"
    yield f"Wrote {done.path} and {done.path}.json. Use it with:", ""
    yield (
        f"mra-cli analyze {model} --method {header['method']} --set calibration={done.path}",
        "",
    )


def _curves(header: dict[str, Any]) -> Table:
    """Means over sites: what is kept, and how much of what matters that is."""
    sites = list(header["sites"].values())
    graph = (
        f"the keys with {header['options']['mass']:.0%} of a row's softmax"
        if header["options"]["graph"] == "mass"
        else "the support of entmax-1.5"
    )
    table = Table(title=escape(f"To be found: {graph} (means over {len(sites)} sites)"))
    for name in ("predictor", "knob", "density", "sparsity", "recall", "mass", "error"):
        table.add_column(name, justify="left" if name == "predictor" else "right")
    for predictor, curve in sites[0]["curves"].items():
        for point, first in enumerate(curve):
            mean = {
                name: fmean(site["curves"][predictor][point][name] for site in sites)
                for name in ("density", "recall", "mass", "error")
            }
            table.add_row(
                predictor if point == 0 else "",
                f"{first['knob']:g}",
                f"{mean['density']:.3f}",
                f"{1 - mean['density']:.3f}",
                f"{mean['recall']:.3f}",
                f"{mean['mass']:.3f}",
                f"{mean['error']:.3f}",
            )
        table.add_section()
    return table


def _errors(header: dict[str, Any]) -> Table:
    """Output errors of each site before and after."""
    table = Table(title="Output error, mean over heads")
    table.add_column("#", justify="right")
    table.add_column("site", overflow="fold")
    names = ["at the start", "fitted"]
    linear = header["method"] == "tff"
    names += ["of the mean value", "heads accepted"] if linear else ["by rank"]
    for name in names:
        table.add_column(name, justify="right")
    for number, (site, found) in enumerate(header["sites"].items()):
        cells = [f"{found['error_before']:.3f}", f"{found['error']:.3f}"]
        if linear:
            heads = len(found["error_by_head"])
            cells += [f"{found['error_of_mean']:.3f}", f"{found['accepted']} of {heads}"]
        else:
            by_rank = found["error_by_rank"].items()
            cells.append(", ".join(f"{rank}: {error:.3f}" for rank, error in by_rank))
        table.add_row(str(number), escape(site), *cells)
    return table
